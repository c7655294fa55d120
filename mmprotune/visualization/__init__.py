from .prompt_maps import as_images, draw_prompt_maps
from .results import draw_result, result_visualizer

__all__ = ['as_images', 'draw_prompt_maps', 'draw_result', 'result_visualizer']
