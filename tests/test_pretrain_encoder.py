"""pretrain_encoder.py: the score of stage 1. What every stage promises is in test_run_folder.py."""

import torch
from conftest import TINY, write_image

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


def test_a_broken_validation_image_is_named_and_does_not_end_the_run(script, tmp_path):
    for name in ("cat", "dog"):
        for part, count in (("train", 4), ("val", 2)):
            for i in range(count):
                write_image(tmp_path / "data" / part / name / f"{i}.png", 40, 40, seed=i)
    (tmp_path / "data" / "val" / "cat" / "1.png").write_text("broken")
    status, out, err = script("pretrain_encoder", *TINY["pretrain_encoder"], "--data", "folder", "--root",
                              tmp_path / "data", "--encoder", "hybrid-small", "--workers", 0, "--out", tmp_path / "o")
    assert status == 0, err
    assert "validation: the next image in place of" in out and "1.png: not a readable image" in out
