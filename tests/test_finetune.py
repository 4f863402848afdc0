"""finetune.py: the four initialisations, and a user's own folder."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from conftest import TINY, flags, load, losses, write_image, write_mask

import data
import datasets
import model
import pictures


def test_each_initialisation_loads_what_it_says(script, few_shapes, tmp_path):
    assert script("pretrain_encoder", *flags("pretrain_encoder"), "--out", tmp_path / "encoder")[0] == 0
    assert (script("pretrain_decoder", *TINY["pretrain_decoder"], "--encoder-weights",
                   tmp_path / "encoder/last.pt", "--out", tmp_path / "ddep")[0] == 0)
    encoder, ddep = load(tmp_path / "encoder/last.pt")["model"], load(tmp_path / "ddep/last.pt")["model"]
    total, in_encoder = len(ddep), sum(name.startswith("encoder.") for name in ddep)

    def start(init):  # the weights before the first step: a rate too small to move them
        out = tmp_path / f"from_{init.parent.name if init != 'none' else init}"
        status, text, err = script("finetune", *flags("finetune"), "--init", init, "--lr", 1e-30,
                                   "--weight-decay", 0, "--steps", 1, "--out", out)
        assert status == 0, err
        return load(out / "last.pt")["model"], next(line for line in text.splitlines()
                                                    if line.startswith("init "))

    weights, said = start(tmp_path / "ddep/last.pt")
    assert (
        f"loaded {total - 2} tensors (encoder and decoder blocks); fresh: 2 tensors, the head (decoder.head.weight, decoder.head.bias)"
        in said)
    assert all(
        torch.equal(weights[name], value) for name, value in ddep.items()
        if not name.startswith("decoder.head"))
    assert weights["decoder.head.weight"].shape[0] == 7

    weights, said = start(tmp_path / "encoder/last.pt")
    assert (
        f"loaded {in_encoder} tensors (the encoder of a checkpoint of this project); fresh: {total - in_encoder} tensors, the decoder"
        in said)
    assert all(
        torch.equal(weights[name], value) for name, value in encoder.items() if name.startswith("encoder."))
    assert not torch.equal(weights["decoder.blocks.0.conv1.weight"], ddep["decoder.blocks.0.conv1.weight"])

    weights, said = start("none")
    assert f"loaded 0 tensors (nothing); fresh: {total} tensors, everything" in said
    assert not torch.equal(weights["encoder.conv_root.weight"], encoder["encoder.conv_root.weight"])


def test_all_parameters_train_in_fine_tuning(script, few_shapes, tmp_path):
    assert script("finetune", *flags("finetune"), "--lr", 1e-30, "--out", tmp_path / "still")[0] == 0
    assert script("finetune", *flags("finetune"), "--out", tmp_path / "moved")[0] == 0
    still, moved = (load(tmp_path / name / "last.pt")["model"] for name in ("still", "moved"))
    assert all(not torch.equal(still[name], moved[name]) for name in still)


def test_fine_tuning_and_evaluate_agree_on_the_score(script, few_shapes, tmp_path):
    assert script("finetune", *flags("finetune"), "--out", tmp_path)[0] == 0
    status, _, err = script("evaluate", "--checkpoint", tmp_path / "last.pt")
    assert status == 0, err
    assert json.loads((tmp_path / "evaluate_last" / "metrics.json").read_text()) == json.loads(
        (tmp_path / "metrics.json").read_text())


def test_a_folder_is_fine_tuned_and_its_subset_can_be_passed_back(script, folder, tmp_path):
    base = [
        "--data", "folder", "--root", folder, "--encoder", "hybrid-small", "--width", 1 / 32, "--crop-size",
        32, "--steps", 2, "--batch-size", 2, "--workers", 0, "--eval-every", 1
    ]
    status, out, err = script("finetune", *base, "--labels", 2, "--out", tmp_path / "a")
    assert status == 0 and "2 labelled images, 3 classes, 2 validation images" in out, err
    assert (tmp_path / "a" / "best.pt").exists() and "sand" in out
    shutil.copy(tmp_path / "a" / "labelled.txt", tmp_path / "again.txt")
    status, out, err = script("finetune", *base, "--train-list", tmp_path / "again.txt", "--out",
                              tmp_path / "b")
    assert status == 0 and "2 labelled images, 3 classes, 2 validation images" in out, err
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_folder_without_validation_images_trains_and_has_no_score(script, folder, tmp_path):
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind / "val")
    status, out, err = script("finetune", "--data", "folder", "--root", folder, "--encoder", "hybrid-small",
                              "--width", 1 / 32, "--crop-size", 32, "--steps", 2, "--batch-size", 2,
                              "--workers", 0, "--out", tmp_path / "o")
    assert (status == 0 and "no validation images" in out and (tmp_path / "o" / "last.pt").exists()
            and not (tmp_path / "o" / "best.pt").exists()), err
    assert set(json.loads((tmp_path / "o" / "metrics.json").read_text())) == {"loss"}


def test_masks_that_are_all_ignored_are_refused(script, folder, tmp_path):
    for path in (folder / "masks").rglob("*.png"):
        height, width = Image.open(path).size[::-1]
        write_mask(path, [[255] * width] * height)
    status, _, err = script("finetune", "--data", "folder", "--root", folder, "--encoder", "hybrid-small", "--width",
                            1 / 32, "--workers", 0, "--out", tmp_path / "o")
    assert status == 2 and "hold fewer than two classes; their values are 255; write to classes.txt" in err


@pytest.mark.parametrize(
    "spoil, message",
    [(lambda root: write_mask(root / "masks/val/f.png", [[9] * 56] * 42),
      "masks/val/f.png: mask value 9, expected 0 to 2"),
     (lambda root: write_image(root / "masks/train/c.png", 43, 55), "masks/train/c.png: mask is RGB"),
     (lambda root: write_mask(root / "masks/train/c.png", [[0]]), "masks/train/c.png: mask is 1x1"),
     (lambda root:
      (root / "images/val/e.jpg").write_text("broken"), "images/val/e.jpg: not a readable image")])
def test_a_fault_in_a_labelled_folder_is_named_before_training(spoil, message, script, folder, tmp_path):
    spoil(folder)
    status, out, err = script("finetune", "--data", "folder", "--root", folder, "--encoder", "hybrid-small",
                              "--width", 1 / 32, "--workers", 0, "--out", tmp_path / "o")
    assert status == 2 and message in err and err.count("\n") == 1 and "step" not in out.split("reading")[1]


def tiles(root, kind=np.uint16, bands=4, part="train", count=6):
    """Satellite tiles: arrays of `bands` bands, with masks of three values."""
    for i in range(count):
        rng = np.random.RandomState(i)
        (root / "images" / part).mkdir(parents=True, exist_ok=True)
        np.save(root / "images" / part / f"{i}.npy", rng.randint(0, 10_000, (40, 48, bands)).astype(kind))
        write_mask(root / "masks" / part / f"{i}.png", rng.choice([0, 50, 255], (40, 48)))
    (root / "classes.txt").write_text("0 water\n50 forest\n255 city\n")
    return root


SMALL = ["--encoder", "hybrid-small", "--workers", 0, "--steps", 2, "--batch-size", 2]


def test_four_bands_of_16_bits_go_through_stages_2_and_3_and_evaluation(script, tmp_path):
    root = ["--data", "folder", "--root", tiles(tmp_path / "data"), "--pixel-range", 0, 10_000]
    status, _, err = script("pretrain_decoder", "--data", "folder", "--root", tmp_path / "data" / "images", "--bands", 4,
                            "--pixel-range", 0, 10_000, *SMALL, "--width", 1 / 32, "--image-size", 32,
                            "--encoder-weights", "random", "--out", tmp_path / "ddep")
    assert status == 0, err
    ddep = load(tmp_path / "ddep" / "last.pt")
    assert ddep["model_args"]["bands"] == 4 and ddep["model"]["decoder.head.weight"].shape[0] == 4
    status, out, err = script("finetune", *root, *SMALL, "--init", tmp_path / "ddep" / "last.pt", "--val-fraction", 0.34,
                              "--crop-size", 32, "--out", tmp_path / "tuned")
    assert status == 0 and "4 labelled images, 3 classes, 2 validation images" in out, err
    tuned = load(tmp_path / "tuned" / "last.pt")
    assert tuned["model_args"]["bands"] == 4 and tuned["model"]["encoder.conv_root.weight"].shape[1] == 4
    status, out, err = script("evaluate", "--checkpoint", tmp_path / "tuned" / "last.pt", "--workers", 0, "--no-flip",
                              "--save-predictions", tmp_path / "pictures")
    assert status == 0, err
    ours = json.loads((tmp_path / "tuned" / "evaluate_last" / "metrics.json").read_text())
    assert ours == json.loads((tmp_path / "tuned" / "metrics.json").read_text())  # the held-out images, this range
    assert len(list((tmp_path / "pictures" / "overlay").rglob("*.png"))) == 2
    status, _, err = script("finetune", *root, *SMALL, "--init", tmp_path / "ddep" / "last.pt", "--bands", 3, "--out",
                            tmp_path / "wrong")
    assert status == 2 and "--bands 3, but" in err and "was made with bands 4; drop the flag" in err
    status, _, err = script("finetune", *root, *SMALL, "--out", tmp_path / "wrong")
    assert status == 2 and "0.npy: 4 bands (H, W, bands: 40, 48, 4), expected 3, as --bands says" in err and err.count("\n") == 1


def test_a_run_is_not_continued_with_other_classes(script, folder, tmp_path):
    flags = ["--data", "folder", "--root", folder, *SMALL, "--width", 1 / 32, "--crop-size", 32, "--out", tmp_path / "o"]
    assert script("finetune", *flags)[0] == 0
    assert "finished" in script("finetune", *flags)[1]
    for names in ("sea\nsky\nsand\n", "0 sky\n1 sea\n2 sand\n255 ignore\n5 ignore\n"):
        (folder / "classes.txt").write_text(names)
        status, _, err = script("finetune", *flags)
        assert status == 2 and "holds a run with other flags or data" in err and "classes-of-masks" in err


def test_the_shares_of_the_classes_are_printed_and_kept(script, folder, tmp_path):
    status, out, err = script("finetune", "--data", "folder", "--root", folder, *SMALL, "--width", 1 / 32, "--crop-size",
                              32, "--out", tmp_path / "o")
    assert status == 0, err
    kept = (tmp_path / "o" / "masks.txt").read_text()
    assert kept in out + "\n" and "training masks" in kept and "validation masks" in kept
    masks = [np.asarray(Image.open(path)) for path in (folder / "masks" / "train").rglob("*.png")]
    share = 100 * sum((mask == 1).sum() for mask in masks) / sum(mask.size for mask in masks)
    assert kept.splitlines()[2].split() == ["sea", f"{share:.2f}", "100.00"]


def test_balanced_class_weights_are_the_inverse_frequencies(script, tmp_path):
    """The first loss is that of torch's own weighted mean, with weights by hand."""
    root = tmp_path / "data"
    for i in range(4):
        write_image(root / "images" / "train" / f"{i}.png", 32, 32, seed=i)
        mask = np.zeros((32, 32))
        mask[:, :8], mask[0, :4] = 1, 2
        write_mask(root / "masks" / "train" / f"{i}.png", mask)
    (root / "classes.txt").write_text("a\nb\nc\n")
    flags = ["--data", "folder", "--root", root, *SMALL, "--width", 1 / 32, "--crop-size", 32, "--batch-size", 4, "--steps",
             1, "--log-every", 1, "--lr", 1e-30]
    for more in ([], ["--class-weights", "balanced"]):
        assert script("finetune", *flags, *more, "--out", tmp_path / f"o{len(more)}")[0] == 0
    plain, balanced = losses(tmp_path / "o0")[0], losses(tmp_path / "o2")[0]
    counts = torch.tensor([32 * 24, 32 * 8 - 4, 4.0])
    weights = (1024 / (3 * counts)).clamp(max=10)
    assert weights[2] == 10  # capped
    checkpoint = load(tmp_path / "o2" / "last.pt")
    unet = model.build_unet(**checkpoint["model_args"])
    unet.load_state_dict(checkpoint["model"])  # the rate was too small to move it
    source, _ = datasets.segmentation_pairs("folder", str(root), "train")
    samples = data.Samples(source, data.segmentation_transform(32), seed=0)
    batch = [samples[key] for key in list(data.Batches(4, 4, 1))[0]]
    x, mask = (torch.stack([sample[kind] for sample in batch]) for kind in ("image", "mask"))
    logits = unet(data.to_pixels(x))
    assert balanced == pytest.approx(F.cross_entropy(logits, mask.long(), weights).item(), rel=1e-4)
    assert plain == pytest.approx(F.cross_entropy(logits, mask.long()).item(), rel=1e-4)


def test_the_encoder_has_a_rate_of_its_own_and_0_freezes_it(script, few_shapes, tmp_path):
    for name, more in (("still", ["--lr", 1e-30]), ("frozen", ["--encoder-lr", 0]), ("slow", ["--encoder-lr", 1e-30]),
                       ("alone", ["--lr", 1e-30, "--encoder-lr", 1e-3])):
        assert script("finetune", *flags("finetune"), *more, "--out", tmp_path / name)[0] == 0
    still, *others = (load(tmp_path / name / "last.pt")["model"] for name in ("still", "frozen", "slow", "alone"))
    for weights, moving in zip(others, ("decoder.", "decoder.", "encoder.")):
        for name, value in weights.items():
            assert torch.allclose(value, still[name], rtol=0, atol=1e-20) != name.startswith(moving), name


def test_a_void_validation_has_no_score(script, folder, tmp_path):
    for path in (folder / "masks" / "val").rglob("*.png"):
        write_mask(path, np.full(np.asarray(Image.open(path)).shape, 255))
    status, out, err = script("finetune", "--data", "folder", "--root", folder, *SMALL, "--width", 1 / 32, "--crop-size",
                              32, "--eval-every", 1, "--out", tmp_path / "o")
    assert status == 0 and "no labelled validation pixel" in out and "mIoU 0.0000" not in out.split("fine-tuned")[0], err
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["miou"] is None
    assert [line["miou"] for line in map(json.loads, (tmp_path / "o" / "log.jsonl").read_text().splitlines())
            if "miou" in line] == [None, None]


def test_a_curve_is_drawn_at_every_save(script, few_shapes, tmp_path):
    assert script("finetune", *flags("finetune"), "--save-every", 2, "--out", tmp_path)[0] == 0
    page = np.asarray(Image.open(tmp_path / "curve.png"))
    assert page.shape == (600, 720, 3)  # the loss and the score
    assert (page == pictures.SERIES[1]).all(-1)[:300].any() and (page == pictures.SERIES[1]).all(-1)[300:].any()


def test_the_position_grid_of_the_weights_is_kept_through_all_stages(script, few_shapes, tmp_path):
    """Weights at another size than the default, as Google's at 384 pixels: nothing is squeezed into another grid."""
    encoder = model.build_encoder("hybrid-small", image_size=96)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"model": state, "model_args": {"encoder": "hybrid-small"}}, tmp_path / "at_96.pt")
    status, _, err = script("pretrain_decoder", *TINY["pretrain_decoder"], "--encoder-weights", tmp_path / "at_96.pt",
                            "--out", tmp_path / "ddep")
    assert status == 0, err
    status, _, err = script("finetune", *TINY["finetune"], "--init", tmp_path / "ddep" / "last.pt", "--lr", 1e-30,
                            "--out", tmp_path / "tuned")
    assert status == 0, err
    tuned = load(tmp_path / "tuned" / "last.pt")
    assert tuned["model_args"]["image_size"] == 96
    assert torch.equal(tuned["model"]["encoder.pos_embedding"], state["encoder.pos_embedding"])
    assert script("evaluate", "--checkpoint", tmp_path / "tuned" / "last.pt")[0] == 0
    status, _, err = script("finetune", *TINY["finetune"], "--init", tmp_path / "at_96.pt", "--lr", 1e-30, "--out",
                            tmp_path / "supervised")
    assert status == 0, err
    supervised = load(tmp_path / "supervised" / "last.pt")["model"]
    assert torch.equal(supervised["encoder.pos_embedding"], state["encoder.pos_embedding"])


def test_a_resnet50_normalises_by_the_batch_when_it_starts_fresh_and_as_stored_when_it_does_not(
        script, few_shapes, tmp_path):
    tiny = [*TINY["finetune"], "--encoder", "resnet50", "--steps", 1, "--lr", 1e-30]

    def statistics(out, *more):
        status, _, err = script("finetune", *tiny, *more, "--out", tmp_path / out)
        assert status == 0, err
        weights = load(tmp_path / out / "last.pt")["model"]
        return weights["encoder.bn1.running_mean"], weights["encoder.bn1.running_var"]

    fresh = torch.zeros(64), torch.ones(64)
    mean, var = statistics("none")
    assert not torch.equal(mean, fresh[0]) and not torch.equal(var, fresh[1])
    assert all(map(torch.equal, statistics("stored", "--batch-norm", "stored"), fresh))
    init = ["--init", tmp_path / "none" / "last.pt"]  # holds trained weights and their statistics
    assert all(map(torch.equal, statistics("trained", *init), (mean, var)))
    assert not torch.equal(statistics("batch", *init, "--batch-norm", "batch")[0], mean)
    status, _, err = script("finetune", *tiny, "--micro-batch", 2, "--out", tmp_path / "none")
    assert status == 2 and "images-per-batch-norm  4     2" in err
    status, _, err = script("finetune", *TINY["finetune"], "--batch-norm", "batch", "--out", tmp_path / "hybrid")
    assert status == 2 and "--batch-norm belongs to --encoder resnet50" in err


def test_a_fold_needs_folds_and_lies_among_them(script, few_shapes, tmp_path):
    for more in (["--fold", 0], ["--folds", 3, "--fold", 3]):
        status, _, err = script("finetune", *flags("finetune"), *more, "--out", tmp_path)
        assert status == 2 and "expected 0 to K-1, with --folds K" in err
    status, _, err = script("finetune", *flags("finetune"), "--folds", 3, "--val-fraction", 0.1, "--out", tmp_path)
    assert status == 2 and "pass one of them" in err
