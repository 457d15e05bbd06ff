"""What comes out of a run: curves, card, push. The packages and the hub are stand-ins; nothing is sent."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import report
import train

RUN = ["--preset", "toy", "--method", "dpo", "--steps", "4", "--warmup_steps", "2", "--eval_every", "2"]
RUN += ["--eval_samples", "0", "--no-eval_kl", "--batch_size", "8"]


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that keeps what it is told; as the real one it passes over steps that it has left behind."""
    module = ModuleType("wandb")
    module.Error, module.login, module.starts, module.lines = RuntimeError, lambda: True, [], {}

    def log(values, step):
        if step >= max(module.lines, default=0):
            module.lines[step] = module.lines.get(step, {}) | values

    module.init = lambda **options: module.starts.append(options) or SimpleNamespace(log=log)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def tensorboard(monkeypatch):
    """A SummaryWriter that keeps (folder, first step that is its own, scalars on the disk)."""
    module, opened = ModuleType("torch.utils.tensorboard"), []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            self.scalars, self.kept = [], []
            opened.append((Path(log_dir), purge_step, self.kept))

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def flush(self):
            self.kept[:] = self.scalars

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return opened


@pytest.fixture
def hub(monkeypatch):
    """A hub at which "me" of the organisation "team" is logged in: what it was asked, and what it has."""
    token = {"accessToken": {"role": "write"}}
    state = SimpleNamespace(made=[], files={}, who={"name": "me", "orgs": [{"name": "team"}], "auth": token})

    def upload_folder(*, repo_id, folder_path):
        state.files[repo_id] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(report, "whoami", lambda: state.who)
    monkeypatch.setattr(report, "create_repo", lambda repo, **options: state.made.append((repo, options)))
    monkeypatch.setattr(report, "upload_folder", upload_folder)
    return state


def drawn(run):
    """By hand what a tracker must have: metrics.jsonl's numbers by step, the last scores at the last step."""
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    steps = {line.pop("step"): {k: v for k, v in line.items() if k != "skipped"} for line in lines}
    after = json.loads(Path(run, "scores.json").read_text())["after"]
    steps[max(steps)] |= {f"eval_{name}": value for name, value in after.items()}
    return steps


def test_trackers_draw_what_metrics_has(folder, wandb, tensorboard):
    """Every number of every line, the held-out scores at steps 2 and 4; the flags; the run's name."""
    train.main([*RUN, "--out", "a/b", "--wandb", "project", "--tensorboard"])
    assert wandb.lines == drawn("a/b") and "eval_accuracy" in wandb.lines[2] and 4 in wandb.lines
    ((place, first, scalars),) = tensorboard
    assert place == Path("a/b/tensorboard") and first == 1
    assert {(k, v, step) for step, line in drawn("a/b").items() for k, v in line.items()} == set(scalars)
    assert len(set(scalars)) == len(scalars), "a value was drawn twice"
    (start,) = wandb.starts
    assert start["project"] == "project" and start["name"] == "b"
    assert start["config"]["beta"] == 0.1 and start["config"]["steps"] == 4


def test_resumed_curves_go_on(folder, wandb, tensorboard):
    """Left after step 4, resumed at the state of step 3: the same wandb run, TensorBoard void from 4 on."""
    flags = [*RUN, "--out", "cut", "--save_every", "3", "--wandb", "p", "--tensorboard"]
    train.main(flags)
    train.main([*flags, "--resume", "auto"])
    once, again = (start["id"] for start in wandb.starts)
    assert once == again and {start["resume"] for start in wandb.starts} == {"allow"}
    assert [first for _, first, _ in tensorboard] == [1, 4]
    assert {step for *_, step in tensorboard[1][2]} == {4}
    train.main(flags)
    assert wandb.starts[2]["id"] != once, "a run from the start is a new one, though in the same folder"


def test_skipped_step_is_not_drawn(tmp_path, wandb):
    """A line's words (why the step was skipped) are no curve."""
    (log,) = report.trackers(SimpleNamespace(wandb="p", tensorboard=False, out=tmp_path), 0)
    log(3, {"step": 3, "skipped": "step 3: loss is not finite", "lr": 0.5})
    assert wandb.lines == {3: {"lr": 0.5}}


def stopped(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*RUN, *flags])
    assert stop.value.code == 2 and not Path("runs/toy/dpo").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_missing_package(folder, monkeypatch, capsys, name):
    """One line before any model is loaded; nothing is asked for without the flag."""
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    monkeypatch.setattr(train, "load_run", None)
    flags = ["--wandb", "project"] if name == "wandb" else ["--tensorboard"]
    assert f"--{name}: pip install {name}" in stopped(flags, capsys)
    report.check(train.parse_args(RUN))


def test_other_ranks_raise_what_the_main_one_found(monkeypatch):
    """Rank 1 looks for nothing itself, and stops with rank 0's line."""
    monkeypatch.setattr(report.fpo, "ranks", lambda: (1, 2))
    monkeypatch.setattr(report.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(report.dist, "broadcast_object_list", lambda said: said.__setitem__(0, "found"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^found$"):
        report.check(SimpleNamespace(wandb="p", tensorboard=False, push_to_hub=None))
    monkeypatch.setattr(report.dist, "broadcast_object_list", lambda said: None)
    report.check(SimpleNamespace(wandb="p", tensorboard=False, push_to_hub=None))


def test_wandb_without_a_login(folder, monkeypatch, wandb, capsys):
    def login():
        raise wandb.Error("no key\nmore of it")

    monkeypatch.setattr(wandb, "login", login)
    assert stopped(["--wandb", "p"], capsys) == "error: --wandb: no key" and not wandb.starts


def test_push(folder, hub, capsys):
    """The saved folder, whole, to the repository; private; the name may be without its owner."""
    assert train.main([*RUN, "--out", "a", "--push_to_hub", "team/model"]) in (0, None)
    assert hub.made == [("team/model", {"private": True, "exist_ok": True})]
    assert hub.files["team/model"] == {p.name: p.read_bytes() for p in Path("a/model").iterdir()}
    assert {"model.safetensors", "config.json", "README.md"} <= set(hub.files["team/model"])
    assert "https://hub/commit" in capsys.readouterr().out
    report.check(train.parse_args([*RUN, "--push_to_hub", "model"]))


@pytest.mark.parametrize(
    ("repo", "says"),
    [("a/b/c", "a/b/c"), ("me/a b", "me/a b"), ("you/model", "those of me, team"), ("me/m", "only read")],
)
def test_push_that_cannot_be(folder, hub, capsys, repo, says):
    """Said before any compute: a wrong name, another's repository, a token that may only read."""
    if says == "only read":
        hub.who["auth"]["accessToken"]["role"] = "read"
    error = stopped(["--push_to_hub", repo], capsys)
    assert error.startswith(f"error: --push_to_hub {repo}: ") and says in error and not hub.made


def test_push_without_a_token(folder, monkeypatch, capsys):
    """The real whoami, where nobody is logged in."""
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    assert "hf auth login" in stopped(["--push_to_hub", "me/model"], capsys)


def test_failed_push_keeps_the_model(folder, hub, monkeypatch, capsys):
    """Status 1, the model and the scores on disk, and the command that pushes them."""

    def upload_folder(**_):
        raise RuntimeError("the line broke")

    monkeypatch.setattr(report, "upload_folder", upload_folder)
    assert train.main([*RUN, "--out", "a", "--push_to_hub", "me/model"]) == 1
    said = capsys.readouterr().err
    assert (
        "--push_to_hub me/model: the line broke" in said and "hf upload me/model a/model . --private" in said
    )
    assert Path("a/model/model.safetensors").stat().st_size > 1e5 and Path("a/scores.json").exists()


def test_card_names_hub_sources_alone(tmp_path, monkeypatch):
    """The hub refuses a card whose base_model or datasets is a path: only its own names stand there."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/pairs.jsonl").touch()
    front = lambda *flags: yaml.safe_load(  # noqa: E731
        report.model_card(train.parse_args([*flags]), {"accuracy": (0.5, 0.75)}).split("---\n")[1]
    )
    card = front("--model", "google/gemma-2-2b@abc", "--dataset", "owner/pairs@v1:train_prefs")
    assert card["base_model"] == "google/gemma-2-2b" and card["datasets"] == "owner/pairs"
    assert card["tags"] == ["fpo", "preference-optimization"]
    card = front("--model", "runs/gemma-2-2b/sft/model", "--dataset", "data/pairs.jsonl")
    assert "base_model" not in card and "datasets" not in card
