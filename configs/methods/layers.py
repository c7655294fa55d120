# Prompts behind every narrow layer in the branches of a ResNet, not behind the last one alone: of a
# bottleneck the first 1x1 and the 3x3 convolution.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    stages=['layer*.*.bn1', 'layer*.*.bn2'],
    prompt=dict(type='mmprotune.PromptBlock'))
