"""README.md: what it names exists, and its code runs."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, flags, write_image

import reproduce


@pytest.mark.parametrize("stage", ["pretrain_decoder", "finetune"])
def test_a_checkpoint_works_with_model_py_alone_as_readme_shows(stage, script, few_shapes, tmp_path):
    assert script(stage, *flags(stage), "--out", tmp_path)[0] == 0
    code = next(block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
                if "torch.load" in block)
    shutil.copy(ROOT / "model.py", tmp_path)
    write_image(tmp_path / "a.png", 50, 70)
    checks = """
print(tuple(y.shape))
picture = Image.open("a.png")
answers = [segment("a.png"), segment(picture), segment(np.asarray(picture))]
assert answers[0].shape == (50, 70) and all(np.array_equal(answer, answers[0]) for answer in answers)
"""
    if stage == "finetune":
        checks += """
with torch.no_grad():
    torch.testing.assert_close(exported.module()(x[..., :224, :224]), unet(x[..., :224, :224]))
"""
    else:  # once is enough: it takes ten seconds
        code = code[:code.index("sizes =")]
    done = subprocess.run([sys.executable, "-c", code + checks], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value
                               for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"(1, {7 if stage == 'finetune' else 3}, 300, 500)", done.stderr


def test_every_file_and_flag_that_readme_names_exists():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"`(\w+\.py)`", readme):
        assert (ROOT / name).exists() or name == "pascal_context.py", name  # mmsegmentation's
    for path in re.findall(r"\]\((figures/[^)]+)\)", readme) + re.findall(r"`(tests/\w+\.py)`", readme):
        assert (ROOT / path).exists(), path
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme))
    of_others = {"--nproc", "--nnodes", "--node", "--master", "--max-restarts", "--help", "--rdzv",  # torchrun's
                 "--nodes", "--ntasks-per-node", "--gpus-per-node", "--gpus", "--array", "--wrap", "--cpus-per-gpu", "--kill-on-invalid-dep",
                 "--parsable", "--dependency"}  # Slurm's
    of_data = {re.match("--[a-z-]+", f"--{name.replace('_', '-')}")[0] for name in reproduce.FOLDERS}  # folders of data sets
    assert not [flag for flag in named - of_others - of_data if f'"{flag.replace("--no-", "--")}"' not in sources]


def test_every_promise_names_its_test():
    heads = (ROOT / "tests" / "test_run_folder.py").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    promised = re.findall(r"test_\w+", heads[:heads.index('"""', 3)])
    assert len(promised) > 20
    assert not [name for name in promised if f"def {name}(" not in tests and not (ROOT / "tests" / f"{name}.py").exists()]


def test_every_source_file_has_a_test_file_and_a_line_in_readme():
    readme = (ROOT / "README.md").read_text()
    for path in ROOT.glob("*.py"):
        assert (ROOT / "tests" / f"test_{path.name}").exists() and f"`{path.name}`" in readme, path.name
