from .attack import AttackedClassifier, PixelClassifier, perturb
from .calibration import CalibrationError, calibration_error
from .class_map import ClassMap, ClassMapEvaluator
from .corruption import mean_corruption_error
from .shot_accuracy import ShotAccuracy, shot_accuracy

__all__ = [
    'AttackedClassifier', 'CalibrationError', 'ClassMap', 'ClassMapEvaluator',
    'PixelClassifier', 'ShotAccuracy', 'calibration_error', 'mean_corruption_error', 'perturb',
    'shot_accuracy'
]
