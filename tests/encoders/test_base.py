"""What every encoder shares: cut off histories, the way from a kind to a class, and what is missing where it is not."""

import pytest
import torch

from userllm.encoders import UserEncoder, config_of, encoder_config_class
from userllm.errors import UserError


def test_prefixes_are_histories_that_ended_there(stored):
    batch = stored.batch([(7, 0, 9), (5, 0, 4), (6, 0, 11), (8, 0, 0)])
    ends = torch.tensor([3, 4, 7, 0])
    cut, alone = batch.prefixes(ends), stored.batch([(7, 0, 3), (5, 0, 4), (6, 0, 7), (8, 0, 0)])
    assert torch.equal(cut.mask, alone.mask) and torch.equal(cut.lengths, ends)
    assert all(torch.equal(cut.fields[name], alone.fields[name]) for name in alone.fields)
    longer = batch.prefixes(torch.tensor([99, 99, 99, 99]))
    assert torch.equal(longer.mask, batch.mask)
    nobody = batch.prefixes(torch.zeros(4, dtype=torch.long))
    assert nobody.mask.shape == (4, 1) and not nobody.mask.any() and not nobody.fields["item"].any()
    assert len(batch.select(ends[:0]).prefixes(ends[:0])) == 0


@pytest.mark.parametrize("kind", ["autoregressive", "dual", "bert4rec"])
def test_a_kind_is_a_class_and_back(make_encoder, kind):
    encoder = make_encoder(kind)
    config = config_of(encoder)
    assert config is not None and type(config) is encoder_config_class(kind) and config.kind == kind
    assert (encoder.width, encoder.max_length) == (16, 12)
    assert encoder.causal == (kind == "autoregressive")
    heads = list(encoder.head_parameters())
    assert heads and {id(weight) for weight in heads} < {id(weight) for weight in encoder.parameters()}


def test_what_an_encoder_leaves_out_is_named(stored):
    class Silent(UserEncoder):
        width, max_length, causal = 4, 5, True

        def forward(self, batch):
            return torch.zeros(*batch.mask.shape, 4), batch.mask

    encoder, batch = Silent(), stored.batch([(7, 0, 3)])
    assert config_of(encoder) is None and list(encoder.head_parameters()) == []
    with pytest.raises(UserError, match="Silent cannot rank the catalogue by itself"):
        encoder.next_item_scores(batch, torch.tensor([0]), torch.tensor([3]))
    with pytest.raises(UserError, match=r"Silent is not pretrained by userllm; .*pretrain: null"):
        encoder.next_event_losses(batch, batch)
    with pytest.raises(TypeError, match="abstract"):
        UserEncoder()
