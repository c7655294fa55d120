from .shot_accuracy import ShotAccuracy, shot_accuracy

__all__ = ['ShotAccuracy', 'shot_accuracy']
