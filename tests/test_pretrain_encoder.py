"""pretrain_encoder.py: its data and loss; what all stages promise is in test_pretrain_decoder.py."""
import numpy as np
import torch
from conftest import TINY, flags, load, losses, write_image

import data
import model
from unlabelled import classification_images


def test_folders_are_classes_the_loss_is_the_cross_entropy_and_a_broken_picture_is_replaced(done, tmp_path):
    for i, name in enumerate(("dog", "cat", "cat", "dog", "emu")):
        write_image(tmp_path / "data" / "train" / name / f"{i}.png", 40, 40 + i, seed=i)
    (tmp_path / "data" / "train" / "cat" / "9.png").write_text("broken")
    more = ["--encoder", "hybrid-small", "--workers", 0, "--data", "folder", "--root", tmp_path / "data"]
    more += ["--micro-batch", 3, "--out", tmp_path / "o"]
    err = done("pretrain_encoder", *TINY["pretrain_encoder"], *more)
    checkpoint = load(tmp_path / "o")
    assert checkpoint["class_names"] == ["cat", "dog", "emu"] and "9.png" in err
    source, _ = classification_images(flags("folder", tmp_path / "data"))
    samples = data.Samples(source, data.pretraining_transform(32, 0.08), 0, replace=True)
    torch.manual_seed(0)
    network, by_hand = model.Classifier(model.build_encoder("hybrid-small"), 3), []
    for key in next(iter(data.Order(6, 4, 4, 1, 0))):
        folder = source.name(key[1]).split("/")[-2]
        logits = network(samples[key]["image"][None] / 127.5 - 1)[0]
        by_hand.append(-torch.log_softmax(logits, 0)[["cat", "dog", "emu"].index(folder)].item())
    np.testing.assert_allclose(losses(tmp_path / "o")[0], np.mean(by_hand), rtol=1e-5)
