# BitFit (arXiv 2106.10199): the backbone's biases train, those of norm layers too.
backbone = dict(type='mmprotune.PromptedBackbone', prompt=None)
trains = 'biases'
