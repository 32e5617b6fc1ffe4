"""A model, a template or a recipe somebody else wrote runs no code unless asked to, and what was asked is recorded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time

import pytest

from pear_data.chat.messages import Conversation
from pear_data.chat.template import ChatTemplate
from pear_data.cli.entry import run
from pear_data.demo import asset
from pear_data.errors import SampleError, UsageError
from pear_data.recipe import load_recipe

CONFIGURATION = """
from pathlib import Path
from transformers import Qwen2Config

Path({canary!r}).touch()

class HostileConfig(Qwen2Config):
    model_type = "{kind}"
"""
MODEL = """
from pathlib import Path
from transformers import Qwen2ForCausalLM
from .configuration_hostile import HostileConfig

Path({canary!r}).touch()

class HostileModel(Qwen2ForCausalLM):
    config_class = HostileConfig
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({canary!r}).touch()

class HostileTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def hostile(tmp_path, canary, monkeypatch):
    """`hostile(kind)`: a model folder with code of its own; `kind` is the model's type."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(kind):
        folder = shutil.copytree(asset("initial"), tmp_path / f"hostile-{kind}")
        names = {"canary": str(canary), "kind": kind}
        (folder / "configuration_hostile.py").write_text(CONFIGURATION.format(**names))
        (folder / "modeling_hostile.py").write_text(MODEL.format(**names))
        (folder / "tokenization_hostile.py").write_text(TOKENIZER.format(**names))
        _add(
            folder / "config.json",
            model_type=kind,
            auto_map={
                "AutoConfig": "configuration_hostile.HostileConfig",
                "AutoModelForCausalLM": "modeling_hostile.HostileModel",
            },
        )
        _add(
            folder / "tokenizer_config.json",
            tokenizer_class="HostileTokenizer",
            auto_map={"AutoTokenizer": [None, "tokenization_hostile.HostileTokenizer"]},
        )
        return str(folder)

    return make


def _add(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    store = tmp_path_factory.mktemp("ingested") / "store"
    corpus = [str(asset("corpus")), "--limit", "4", "--tokenizer", str(asset("initial"))]
    assert run(["ingest", *corpus, "--store", str(store)]) == 0
    return store


@pytest.mark.parametrize("kind", ["hostile", "qwen2"])
def test_no_command_runs_a_models_code(hostile, ingested, tmp_path, canary, kind, capsys):
    store = shutil.copytree(ingested, tmp_path / "store")
    model = ["--model", hostile(kind), "--engine", "transformers", "--store", str(store)]
    corpus = [str(asset("corpus")), "--limit", "4", "--store", str(tmp_path / "other")]
    commands = [
        ["ingest", *corpus, "--tokenizer", model[1]],
        ["score", *model, "--dry-run"],
        ["score", *model, "--audit", "2"],
    ]
    if kind == "hostile":
        commands.append(["score", *model, "--policy", "aligned", "--align", "bytes"])
    for command in commands:
        code = run(command)
        shown = capsys.readouterr().err.splitlines()
        assert code == (1 if kind == "hostile" else 0), command
        assert "unexpected" not in shown[-1]
        assert "Traceback" not in "".join(shown)
        assert not canary.exists(), command


def test_code_that_was_asked_for_is_recorded(hostile, ingested, tmp_path, canary):
    store = shutil.copytree(ingested, tmp_path / "store")
    model = ["--model", hostile("hostile"), "--engine", "transformers", "--store", str(store)]
    assert run(["score", *model, "--trust-remote-code"]) == 0
    assert canary.exists()
    stages = json.loads((store / "manifest.json").read_text())["stages"]
    assert stages["scores/initial"]["settings"]["trust_remote_code"] is True
    assert stages["corpus"]["settings"]["trust_remote_code"] is False


class _Canary:
    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return (os.mkdir, (str(self._path),))


def test_pickled_weights_are_refused_in_one_line(ingested, tmp_path, canary, capsys):
    store = shutil.copytree(ingested, tmp_path / "store")
    folder = shutil.copytree(asset("initial"), tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(_Canary(canary)))
    for _ in range(2):
        where = ["--store", str(store), "--engine", "transformers"]
        assert run(["score", "--model", str(folder), *where]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
        assert "cannot load the model" in line
        assert not canary.exists()
        (folder / "model.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "name", ["../../x", "./nowhere", "a\nb", "a\0b", "", "/etc/passwd", "\x1b[2J", "x" * 5000]
)
def test_a_models_name_is_only_a_name(ingested, tmp_path, name, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert run(["score", "--model", name, "--engine", "transformers", "--store", str(ingested)]) in (1, 2)
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "report the traceback" not in shown
    assert sorted(tmp_path.rglob("*")) == before


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os }}",
    "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ tojson.__globals__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ ('%s'|format(1)).__class__.__init__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{m.__class__.__mro__}'.format_map({'m': messages}) }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{% import '/etc/passwd' as x %}{{ x }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ range(10 ** 9) }}",
    "{% set x = ''.__class__ %}{{ x.__name__ }}",
    "{{ x.__class__ }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ request.application.__globals__ }}",
    "{{ config.items() }}",
    "{{ messages.__len__.__self__.__reduce_ex__(2) }}",
)


@pytest.mark.parametrize("text", ESCAPES)
def test_no_template_leaves_its_sandbox(text, canary):
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    conversation = Conversation(messages, None)
    try:
        shown = ChatTemplate(text.replace("CANARY", str(canary)), {}).render(conversation).text
    except (SampleError, UsageError):
        shown = ""
    assert not canary.exists()
    assert not any(
        word in shown for word in ("<class", "root:", "<module", "__builtins__", "<function", "type")
    )
    assert conversation.messages == messages


RECIPES = {
    "a tag that runs code": "steps: [!!python/object/apply:os.system ['touch CANARY']]",
    "a tag that makes an object": "steps: [!!python/object:os.path {}]",
    "a tag that imports": "steps: [!!python/module:os ]",
    "a tag that names": "store: !!python/name:os.system\nsteps: []",
    "a tag of one's own": "steps: [!run touch]",
    "an unknown step": "steps: [{shell: touch CANARY}]",
    "an unknown setting": "steps: [{weight: {run: touch CANARY}}]",
    "an unknown key": "run: touch CANARY\nsteps: [{weight: {}}]",
    "variables are text": "steps: [{weight: {name: '${HOME}'}}]",
    "a name that is a path": "steps: [{weight: {name: ../../x}}]",
    "a policy that is a path": "steps: [{score: {policy: /tmp/x, model: m}}]",
    "merge keys": "a: &a {run: x}\nsteps: [{weight: {<<: *a}}]",
    "itself": "steps: &a [*a]",
    "a tower of brackets": "steps: " + "[" * 20_000 + "]" * 20_000,
    "a number of 10,000 digits": "steps: [{weight: {gamma: " + "1" * 10_000 + "}}]",
    "a day that is none": "steps: [{weight: {name: 2026-99-99}}]",
    "a billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "steps: [{ingest: {corpus: *i, tokenizer: t}}]",
    "two documents": "steps: []\n---\nsteps: []",
    "a control character": "steps: ['\x1b[2J']",
}


@pytest.mark.parametrize("kind", RECIPES)
def test_no_recipe_runs_code_or_leaves_its_place(kind, tmp_path, canary, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[kind].replace("CANARY", str(canary)))
    start = time.monotonic()
    with pytest.raises(UsageError):
        load_recipe(str(path))
    assert run(["run", str(path), "--store", str(tmp_path / "store")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "\x1b" not in shown
    assert len(shown) < 1000
    assert time.monotonic() - start < 20
    assert not canary.exists()
    assert not (tmp_path / "store").exists()


def test_loaders_are_named_in_one_place_each():
    """Whoever adds a loader call sees here that it takes the flag."""
    import re
    from pathlib import Path

    import pear_data

    package = Path(pear_data.__file__).parent
    calls = re.compile(
        r"(\.from_pretrained|\.from_config|vllm\.LLM|torch\.load|pickle\.load)\(([^)]*)\)", re.DOTALL
    )
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "demo") or path.is_relative_to(package / "hooks"):
            continue
        for name, arguments in calls.findall(path.read_text(encoding="utf-8")):
            assert name not in ("torch.load", "pickle.load"), path
            assert (
                "trust_remote_code" in arguments or "**options" in arguments or "**arguments(" in arguments
            ), path
