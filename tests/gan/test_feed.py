"""The batches of the GAN: which tiles the discriminator compares."""

import numpy as np
import pytest

from histosynth.gan.feed import Feed
from histosynth.gan.layers import group_size
from tests.gan.helpers import tiles, tiny_config


@pytest.mark.parametrize(("accumulate", "processes", "group"), [(1, 1, 4), (2, 1, 4), (2, 2, 4), (1, 1, 0), (4, 1, 3)])
def test_a_group_of_the_minibatch_deviation_is_of_one_class(accumulate: int, processes: int, group: int) -> None:
    data = tiles(per_class=8)
    config = tiny_config(batch=24, accumulate=accumulate, class_groups=True, mbstd_group=group)
    mixed = tiny_config(batch=24, accumulate=accumulate, mbstd_group=group)
    part = 24 // (accumulate * processes)
    size = group_size(part, group)
    alike = []
    with Feed(data, config, 9, processes=processes) as feed, Feed(data, mixed, 9) as usual:
        for step in range(9):
            # as the layer folds a part: [size, part / size]
            for batch in (feed(step), usual(step)):
                compared = batch.labels.numpy().reshape(-1, size, part // size)
                alike.append((compared == compared[:, :1]).all())
    assert all(alike[::2]) and not all(alike[1::2])
    counts = np.bincount(np.concatenate([feed(k).labels.numpy() for k in range(9)]))
    assert counts.tolist() == [72, 72, 72]
