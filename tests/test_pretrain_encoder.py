"""pretrain_encoder.py: the score of stage 1. What every stage promises is in test_run_folder.py."""

import torch

import data
import launch
from pretrain_encoder import top1


def test_top1_is_the_share_of_right_answers():

    class Five:

        def __len__(self):
            return 5

        def read(self, i):
            return {"image": torch.zeros(3, 4, 4, dtype=torch.uint8), "label": [0, 1, 2, 0, 1][i]}

    loader = data.load(data.Samples(Five()), data.Each(5, batch_size=2))

    class AlwaysOne(torch.nn.Module):

        def forward(self, x):
            return torch.tensor([0.0, 1.0, 0.5]).expand(len(x), 3)

    assert top1(AlwaysOne(), loader, "fp32", launch.Processes(0, 1, torch.device("cpu"))) == 2 / 5
