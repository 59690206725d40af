"""Build everything under data/: `python data/build.py --tasks | --train NAME | --measure | --table | --check`.

--tasks            draw the tasks again and write them to data/tasks
--tokenizer        train the tokenizer again (every model must then be pretrained again)
--train NAME       pretrain one model (on --device cuda or cpu, for at most --seconds); resumes where it was stopped
--shards FOLDER    write the text ahead by --workers processes; with --train, read it there
--measure          measure what is missing in data/measurements.json; --only PREFIX for a part of it
--table            write the measurements into data/README.md, the cards and SHA256SUMS
--check            rebuild the tasks, verify every weight file, measure the held-out losses; compare with what is stored
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def sums() -> str:
    """One line per file that pefttutor.models.load verifies: sha256, two blanks, path under data/models."""
    files = sorted(p for p in (HERE / "models").glob("campus-*/*") if p.suffix in (".safetensors", ".json"))
    return "".join(
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(HERE / 'models')}\n" for p in files
    )


def check() -> list[str]:
    """What differs from what the scripts say; empty when all is well."""
    from world import measure, tasks

    problems = []
    for task in tasks.ALL:
        path = HERE / "tasks" / task.name
        stored = (
            json.loads((path / "task.json").read_text(encoding="utf-8"))
            if (path / "task.json").exists()
            else {}
        )
        fresh = tasks.draw_splits(task)
        if stored.get("fingerprint") != tasks.fingerprint(fresh):
            problems.append(
                f"data/tasks/{task.name}/task.json: not what the generator draws; run python data/build.py --tasks"
            )
        elif tasks.read(task, path.parent) != fresh:
            problems.append(
                f"data/tasks/{task.name}: the parquet files differ from the generator; run python data/build.py --tasks"
            )
    if (HERE / "models" / "SHA256SUMS").read_text() != sums():
        problems.append(
            "data/models: a file differs from SHA256SUMS; run git checkout -- data/models, or train it again"
        )
        return problems
    for key, value in measure.stored().items():
        if key.startswith("held_out"):
            again = measure.compute(key)
            if abs(again - value) > 0.002:
                problems.append(
                    f"{key}: measured {again:.4f} now, {value:.4f} is stored; run python data/build.py --measure"
                )
    return problems


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("--tasks", "--tokenizer", "--measure", "--table", "--check"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--train", metavar="NAME")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--seconds", type=float, help="end a training after so long, its schedule fitted to the clock"
    )
    parser.add_argument("--shards", type=Path, metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=2, help="processes that write shards or measure")
    parser.add_argument(
        "--work", type=Path, default=HERE / ".checkpoints", help="where checkpoints are kept while training"
    )
    parser.add_argument("--only", default="", help="measure only the keys that start so")
    args = parser.parse_args()
    if args.tasks:
        from world import tasks

        for task in tasks.ALL:
            print(task.name, tasks.write(task)[:12])
    if args.tokenizer:
        from world import corpus

        corpus.train_tokenizer().save(str(HERE / "models" / "tokenizer.json"))
    if args.train:
        import torch
        from world import pretrain

        if args.train not in pretrain.RECIPES:
            parser.error(f"--train {args.train}: expected one of {', '.join(pretrain.RECIPES)}")
        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error(
                "--device cuda: torch sees no GPU here; take --device cpu, with --seconds for a short run"
            )
        pretrain.train(args.train, args.work, device=args.device, seconds=args.seconds, shards=args.shards)
    elif args.shards:
        from world import rows

        print(f"{rows.write_ahead(args.shards, args.workers):,} tokens written")
    if args.measure:
        from world import measure

        measure.run(args.only, workers=args.workers)
    if args.table:
        from world import cards

        (HERE / "models" / "SHA256SUMS").write_text(sums())
        cards.write_all()
    if args.check:
        problems = check()
        print("\n".join(problems) or "data/ is what its scripts make")
        return bool(problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
