"""What comes out of a run: curves in a tracker, the model with its card, a repository on the hub."""

import shutil
import sys
import uuid
from pathlib import Path

import torch.distributed as dist
from huggingface_hub import create_repo, upload_folder, whoami
from huggingface_hub.utils import validate_repo_id

import fpo
import offline
import precision
import presets
from data import Renderer, split_revision


def check(args):
    """That --wandb, --tensorboard and --push_to_hub can be done: the main rank looks, every rank raises.

    Raises: ValueError: a missing package, a name that no repository can have, a token that may not write.
    """
    said = [None if fpo.ranks()[0] else _obstacle(args)]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    if said[0]:
        raise ValueError(said[0])


def _obstacle(args) -> str | None:
    try:
        if flag := args.tensorboard and "tensorboard":
            import torch.utils.tensorboard  # noqa: F401
        if flag := args.wandb and "wandb":
            import wandb

            wandb.login()
        if flag := args.push_to_hub and f"push_to_hub {args.push_to_hub}":
            _check_token(args.push_to_hub)
    except ImportError as error:
        return f"--{flag}: pip install {flag} ({error})"
    except Exception as error:  # a name, a token, the network; wandb's errors have no name before its import
        return f"--{flag}: {(str(error) or repr(error)).strip().splitlines()[0]}"
    return None


def _check_token(repo: str):
    """Raises what is wrong with the name, or with the token that would push to it."""
    validate_repo_id(repo)
    who = whoami()
    owners = [who["name"], *(org["name"] for org in who.get("orgs", ()))]
    if "/" in repo and repo.split("/")[0] not in owners:
        raise ValueError(f"this token's repositories are those of {', '.join(owners)}")
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("this token may only read; make one that may write")


def trackers(args, start: int) -> list:
    """The trackers asked for, as functions `log(step, values)` that draw the numbers. For the main rank.

    Args:
        start: steps done before. A resumed run goes on in its own curves with no step doubled: TensorBoard
            voids what it had of later ones, wandb passes over them. At 0 the curves are new.
    """
    logs, out = [], Path(args.out)

    def numbers(values):  # a line of metrics.jsonl without its step, and without why a step was skipped
        return {k: v for k, v in values.items() if k != "step" and isinstance(v, int | float)}

    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out / "tensorboard", purge_step=start + 1)

        def to_tensorboard(step, values):
            for name, value in numbers(values).items():
                writer.add_scalar(name, value, step)
            writer.flush()

        logs.append(to_tensorboard)
    if args.wandb:
        import wandb

        key = out / "wandb_id"
        if not (start and key.exists()):
            key.write_text(uuid.uuid4().hex)
        run = wandb.init(
            project=args.wandb, name=out.name, id=key.read_text(), resume="allow", config=vars(args), dir=out
        )
        logs.append(lambda step, values: run.log(numbers(values), step=step))
    return logs


def save_model(policy, tokenizer, args):
    """A Hugging Face directory, written aside and renamed. Every rank must call it."""
    state = precision.full_state_dict(policy)
    if fpo.ranks()[0]:
        return
    out, aside, old = (Path(args.out) / name for name in ("model", "model.tmp", "model.old"))
    shutil.rmtree(aside, ignore_errors=True)
    policy.lm.config.dtype = dtype = presets.DTYPES[args.dtype]
    # What it was trained to end a turn with must end generation too; a base model's own config may not know.
    stops = policy.lm.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), Renderer(tokenizer).end} - {None}
    policy.lm.generation_config.eos_token_id = sorted(stops)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    with offline.writing(aside):
        policy.lm.save_pretrained(aside, state_dict=state)
        tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(model_card(args, {}))
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def model_card(args, scores: dict) -> str:
    """What a model card says: method, data, hyperparameters, held-out scores before and after."""
    rows = "\n".join(f"| {name} | {before:.4g} | {after:.4g} |" for name, (before, after) in scores.items())
    settings = "\n".join(f"- {name}: {value}" for name, value in sorted(vars(args).items()))
    front = f"library_name: transformers\ntags: [{args.method}, preference-optimization]\n"
    for key, source in (("base_model", args.model), ("datasets", args.dataset)):
        name, _ = split_revision(source.split(":")[0])
        if name.count("/") == 1 and not Path(name).exists():  # the hub refuses a card with a path here
            front += f"{key}: {name}\n"
    return (
        f"---\n{front}---\n\n# {args.model}, trained with {args.method.upper()}\n\n"
        f"Method: {args.method} (arXiv 2411.07618). Data: {args.dataset}.\n\n"
        f"| held-out {args.eval_dataset} | before | after |\n|---|---|---|\n{rows}\n\n"
        f"Settings:\n\n{settings}\n"
    )


def print_table(scores: dict):
    """The run in a few lines: held-out scores before and after."""
    print(f"\n{'held-out':<30}{'before':>10}{'after':>10}")
    for name, (before, after) in scores.items():
        print(f"{name:<30}{before:>10.4f}{after:>10.4f}")


def push(folder, repo: str) -> int:
    """The saved model to the hub; a new repository is private. Returns the exit status: 0, 1 if it failed."""
    try:
        create_repo(repo, private=True, exist_ok=True)
        print(upload_folder(repo_id=repo, folder_path=folder).commit_url)
    except Exception as error:  # whatever it is, the run is done and its model is on disk
        print(f"error: --push_to_hub {repo}: {error}", file=sys.stderr)
        print(f"the model is whole: hf upload {repo} {folder} . --private", file=sys.stderr)
        return 1
    return 0
