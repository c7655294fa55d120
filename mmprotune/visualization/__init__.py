from .prompt_maps import as_images, draw_prompt_maps

__all__ = ['as_images', 'draw_prompt_maps']
