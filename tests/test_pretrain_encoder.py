"""pretrain_encoder.py: its data and loss; what all stages promise is in test_pretrain_decoder.py."""
import numpy as np
import torch
from conftest import TINY, imagenet21k, load, losses, write_image

import data
import datasets
import model
import pretrain_encoder

SMALL = [*TINY["pretrain_encoder"], "--encoder", "hybrid-small", "--workers", 0]


def test_folders_are_classes_and_the_loss_is_the_cross_entropy(script, tmp_path):
    for i, name in enumerate(("dog", "cat", "cat", "dog", "emu")):
        write_image(tmp_path / "data" / "train" / name / f"{i}.png", 40, 40 + i, seed=i)
    root = ["--data", "folder", "--root", tmp_path / "data"]
    status, _, err = script("pretrain_encoder", *SMALL, *root, "--micro-batch", 3, "--out", tmp_path / "o")
    assert status == 0, err
    checkpoint = load(tmp_path / "o")
    assert checkpoint["class_names"] == ["cat", "dog", "emu"] and checkpoint["data"].startswith("5 images")
    source, _ = datasets.classification_images(pretrain_encoder.parse_arguments([*map(str, root)]))
    samples = data.Samples(source, data.pretraining_transform(32, 0.08), 0)
    torch.manual_seed(0)
    network, by_hand = model.Classifier(model.build_encoder("hybrid-small"), 3), []
    for key in next(iter(data.Order(5, 4, 4, 1, 0))):
        folder = source.name(key[1]).split("/")[-2]
        logits = network(samples[key]["image"][None] / 127.5 - 1)[0]
        by_hand.append(-torch.log_softmax(logits, 0)[["cat", "dog", "emu"].index(folder)].item())
    np.testing.assert_allclose(losses(tmp_path / "o")[0], np.mean(by_hand), rtol=1e-5)


def test_tar_files_are_classes_and_an_unreadable_member_is_replaced(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    root = ["--data", "imagenet21k", "--root", imagenet21k(tmp_path / "tars")]
    status, _, err = script("pretrain_encoder", *SMALL, *root, "--out", tmp_path / "o")
    assert status == 0 and "n00000002.tar" in err, err
    checkpoint = load(tmp_path / "o")
    assert checkpoint["class_names"] == ["n00000001", "n00000002"] and checkpoint["data"].startswith("5 images")


def test_it_learns_and_its_encoder_serves_stage_2(script, few, tmp_path):
    more = ["--steps", 60, "--lr", 2e-3, "--out", tmp_path / "encoder"]
    assert script("pretrain_encoder", *TINY["pretrain_encoder"], *more)[0] == 0
    values = losses(tmp_path / "encoder")
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])
    more = ["--encoder-weights", tmp_path / "encoder" / "last.pt", "--out", tmp_path / "decoder"]
    assert script("pretrain_decoder", *TINY["pretrain_decoder"], *more)[0] == 0
    trained, used = load(tmp_path / "encoder")["model"], load(tmp_path / "decoder")["model"]
    names = [name for name in used if name.startswith("encoder.")]
    assert len(names) == len(trained) - 2 and all(torch.equal(used[name], trained[name]) for name in names)
