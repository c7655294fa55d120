# The stock 1x schedule (12 epochs, steps at 8 and 11, 500 iterations of warm-up, batch 16) with
# another optimizer. Prompted, head-only and full fine-tuning share it, which makes them comparable.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

optim_wrapper = dict(
    # Instead of SGD with 0.02: freshly added prompts sit at every depth of the network, and their
    # gradients differ in scale by stage; AdamW takes steps of equal size for all of them. Learning
    # rate and decay are those of mmdet's own AdamW recipe for this detector
    # (resnet_strikes_back), so that full fine-tuning is not handicapped by the exchange.
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=0.05),
    # Decay takes lr * weight_decay = 1e-5 of a weight's size off it at every step, five times what
    # the stock recipe takes: too much for norm weights and biases.
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
