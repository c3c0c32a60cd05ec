import numpy as np

from hf_csm.mixture.collate import collate
from hf_csm.models.family import NO_TOKEN, Layout, Window


LAYOUT = Layout((0, 0, 2), 1, 1, 3, 0, 10, 8)


def test_windows_end_with_no_token_for_the_largest_delay():
    windows = [Window("a", np.full((3, 2), 5), 0), Window("b", np.full((3, 4), 6), 1)]
    batch = collate(windows, LAYOUT)
    assert batch.codes[:, 0].tolist() == [[5, 5, NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN], [6, 6, 6, 6, -1, -1]]
    assert batch.codes.shape == (2, 3, 6)
    assert batch.num_given.tolist() == [0, 1]
    assert batch.ids == ("a", "b")
