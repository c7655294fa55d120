import torch

from mmprotune.freezing import digest_tensors, fingerprint


def test_digest_depends_on_every_part():
    x = torch.arange(4.)
    one = digest_tensors(dict(a=x))['a']
    assert digest_tensors(dict(a=x.clone()))['a'] == one
    others = [dict(b=x), dict(a=x.double()), dict(a=x.view(2, 2)), dict(a=x + 1e-6)]
    assert len({one, *(next(iter(digest_tensors(o).values())) for o in others)}) == 5


def test_fingerprint_ignores_order_layout_and_knows_every_dtype():
    tensors = dict(
        a=torch.randn(3, 4, 5, 5), b=torch.arange(3), c=torch.ones(2, dtype=torch.bfloat16),
        d=torch.tensor(True), e=torch.zeros(0))
    print_ = fingerprint(tensors)
    assert print_.shape == (32, ) and print_.dtype == torch.uint8
    assert torch.equal(print_, fingerprint(dict(reversed(tensors.items()))))
    moved = dict(tensors, a=tensors['a'].to(memory_format=torch.channels_last))
    assert torch.equal(print_, fingerprint(moved))
    assert not torch.equal(print_, fingerprint(dict(tensors, d=torch.tensor(False))))


# --- audit: each way to break the promise is caught ------------------------------------------
