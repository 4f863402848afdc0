"""README.md: what it names exists."""
import re
import shlex

from conftest import ROOT
from torch.distributed.run import get_args_parser

README = (ROOT / "README.md").read_text()
SCRIPTS = ["pretrain_encoder", "pretrain_decoder", "finetune", "evaluate", "reproduce", "benchmark"]
FLAG = r"(?<![\w-])--[a-z][a-z_-]+"


def commands():
    """[(script, its words), ...] of the blocks of commands."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for at, word in enumerate(words):
                if word.endswith(".py") and word[:-3] in SCRIPTS:
                    yield word[:-3], words[at + 1:]


def test_every_flag_exists_in_the_script_that_it_is_used_with(script):
    flags = {name: set(re.findall(FLAG, script(name, "--help")[1])) for name in SCRIPTS}
    found = list(commands())
    assert {"pretrain_decoder", "finetune", "evaluate", "reproduce"} <= {name for name, _ in found}
    assert not [(name, word) for name, words in found for word in words
                if word.startswith("--") and word not in flags[name]]
    torchruns = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    assert set(re.findall(FLAG, prose)) <= set().union(*flags.values(), torchruns)


def test_every_file_exists():
    names = re.findall(r"`((?:\w+/)*\w+\.(?:py|md|txt|cff))`", README)
    paths = [path for path in re.findall(r"\]\(([^)]+)\)", README) if not path.startswith(("http", "#"))]
    of_others = {"classes.txt", "pascal_context.py"}  # a user's, mmsegmentation's
    assert names and paths
    assert not [path for path in {*names, *paths} - of_others if not (ROOT / path).exists()]
