"""The steps of the demo, in order: each runs the command a person would type, and is judged."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.commands import IVDR, TRAIN, Pattern, StepError, run, serving
from ivdr_deploy._console import console
from ivdr_deploy._text import quoted
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import FolderError, IvdrError
from ivdr_deploy.evaluation.metrics import Accuracy

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"

_MARKER = ".ivdr-demo"
_MADE_ANEW = ("pretrain", "finetune", "scratch", "joint", "scores")
"""Folders of an earlier demo: training and scoring would go on from there instead of beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step gave."""

    name: str
    passed: bool
    seconds: float
    detail: str


@dataclass
class Journey:
    """The demo on one data set.

    Attributes:
        out: Run folder.
        overrides: Settings (``key=value``) for the training in each run folder.
        minimum_accuracy: Video accuracy on the test list below which the demo fails.
        train: Training list.
        test: Test list.
        pattern: Names the videos of the test list in short; None: each is written out.
        steps: What was run so far.
        facts: Figures for the report.
        labels: For each way to a label, that of every test video in order.
    """

    out: Path
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    minimum_accuracy: float = 0.0
    train: Path = Path()
    test: Path = Path()
    pattern: Pattern | None = None
    steps: list[Step] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)

    @property
    def bundle(self) -> Path:
        """Where the export goes."""
        return self.out / "bundle"

    @property
    def checkpoint(self) -> Path:
        """What the last stage of training writes."""
        return self.out / "joint" / "checkpoint.safetensors"

    def claim_folder(self) -> None:
        """Make the run folder, or take that of an earlier demo: what the demo made before, it deletes.

        Raises:
            FolderError: if it holds anything, and no demo made it.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        marker = self.out / _MARKER
        if not marker.exists() and (found := next(self.out.iterdir(), None)) is not None:
            raise FolderError(
                f"{self.out} holds {quoted(found.name)} and is not the run folder of a demo",
                hint="remove it, or give a new or empty folder with --out",
            )
        marker.write_text(f"Made by the demo, which makes {', '.join(_MADE_ANEW)} and data here anew.\n")

    def run(self) -> bool:
        """Run every step; stop at the first that fails. Returns whether all passed."""
        order: tuple[tuple[str, Callable[[], str]], ...] = (
            ("pre-train", self.pretrain),
            ("fine-tune", self.finetune),
            ("fine-tune from scratch", self.finetune_from_scratch),
            ("fine-tune jointly", self.finetune_jointly),
            ("evaluate", self.evaluate),
            ("export", self.export),
            ("verify", self.verify),
            ("archive", self.archive),
            ("predict", self.predict),
            ("serve", self.serve),
            ("score", self.score),
            ("agree", self.agree),
            ("bench", self.bench),
        )
        for name in _MADE_ANEW:
            if (self.out / name).exists():
                shutil.rmtree(self.out / name)
        return all(self.step(name, action) for name, action in order)

    def step(self, name: str, action: Callable[[], str]) -> bool:
        """Run and record one step; an error of ours fails it, any other is a defect and is raised."""
        console.rule(f"[bold]{len(self.steps) + 1}. {name}", align="left")
        start = time.perf_counter()
        try:
            passed, detail = True, action()
        except (StepError, IvdrError) as error:
            passed, detail = False, str(error)
        self.steps.append(Step(name=name, passed=passed, seconds=time.perf_counter() - start, detail=detail))
        console.print(
            f"{'PASS' if passed else 'FAIL'}: {detail}", style="green" if passed else "red", markup=False
        )
        return passed

    def pretrain(self) -> str:
        """Learn the dual representation without labels."""
        return self._train("pretrain", "demo_pretrain.toml", folder="pretrain")

    def finetune(self) -> str:
        """Train the classifier on the pre-trained backbone."""
        return self._train("finetune", "demo_finetune.toml", folder="finetune", init="pretrain")

    def finetune_from_scratch(self) -> str:
        """Do the same without pre-training, to see what it gave."""
        return self._train("finetune", "demo_finetune.toml", folder="scratch")

    def finetune_jointly(self) -> str:
        """Go on with all losses for a while: cross-entropy alone has left `inter` and `intra` behind."""
        return self._train("finetune", "demo_joint.toml", folder="joint", init="finetune")

    def _train(self, command: str, config: str, *, folder: str, init: str = "") -> str:
        settings = [
            f"out={self.out / folder}",
            f"data.train={self.train}",
            f"data.cache={self.out / 'cache'}",
        ]
        if init:
            settings.append(f"init={self.out / init / 'checkpoint.safetensors'}")
        path = os.path.relpath(CONFIGS / config)
        run(TRAIN, command, "--config", path, *settings, *self.overrides.get(folder, ()))
        return f"wrote {self.out / folder / 'checkpoint.safetensors'}"

    def evaluate(self) -> str:
        """Measure every stage on the test list."""
        report, tuned, scratch = (self._evaluate(folder) for folder in ("joint", "finetune", "scratch"))
        value, with_it, without = (one["video_accuracy"]["value"] for one in (report, tuned, scratch))
        self.facts |= {
            "video_accuracy": value,
            "clip_accuracy": report["clip_accuracy"]["value"],
            "view_plan": report["view_plan"],
            "video_accuracy_finetuned_with_pretraining": with_it,
            "video_accuracy_finetuned_without_pretraining": without,
            "pretraining_gain": with_it - without,
            "per_class": report["per_class"],
        }
        counts = report["video_accuracy"]
        detail = (
            f"video accuracy {Accuracy(counts['correct'], counts['total'])}; fine-tuned with pre-training "
            f"{with_it:.1%}, without {without:.1%}; after the joint stage {value:.1%}"
        )
        if value < self.minimum_accuracy:
            raise StepError(f"{detail}; at least {self.minimum_accuracy:.0%} was expected")
        return detail

    def _evaluate(self, folder: str) -> dict[str, Any]:
        checkpoint = self.out / folder / "checkpoint.safetensors"
        report: dict[str, Any] = json.loads(
            run(TRAIN, "evaluate", checkpoint, "--videos", self.test, "--json")
        )
        return report

    def export(self) -> str:
        """Make the bundle."""
        run(IVDR, "export", self.checkpoint, "-o", self.bundle, "--name", "demo")
        return f"wrote {self.bundle}"

    def verify(self) -> str:
        """Compare the bundle's variants on the golden clips and on every test video."""
        run(IVDR, "verify", self.bundle, "--videos", self.test)
        return "the variants agree on the golden clips and on the test videos"

    def archive(self) -> str:
        """Pack the bundle for TorchServe."""
        run(IVDR, "archive", self.bundle, "--model-store", self.out / "model_store")
        return f"wrote {self.out / 'model_store' / 'demo.mar'}"

    def predict(self) -> str:
        """Label every test video, with torch and with what the bundle runs."""
        for name, artifact in (("torch", self.checkpoint), ("bundle", self.bundle)):
            lines = run(IVDR, "predict", artifact, *self._videos(), "--json", "--top-k", "1").splitlines()
            labels = {line["uri"]: line["predictions"][0]["label"] for line in map(json.loads, lines)}
            self.labels[name] = [labels[str(item.path)] for item in self._list().items]
        return f"{len(self._list().items)} videos labelled by each"

    def serve(self) -> str:
        """Start the real TorchServe and send it every test video over HTTP."""
        labels = []
        archive = self.out / "model_store" / "demo.mar"
        with serving(archive, run_dir=self.out / "serve") as client:
            for number, item in enumerate(self._list().items):
                options = {"timings": True, "outputs": ["labels", "inter", "intra"]} if number == 0 else None
                status, body = client.predict(item.path, options=options)
                if status != 200:
                    raise StepError(f"{item.uri}: HTTP status {status}: {body}")
                labels.append(body["predictions"][0]["label"])
                if number == 0:
                    console.print(f"POST {item.uri} -> {_shortened(body)}", markup=False)
                    console.print(f"answer: {labels[0]}   truth: {item.label}", style="bold", markup=False)
        self.labels["endpoint"] = labels
        return f"{len(labels)} videos answered over HTTP; the server is stopped"

    def score(self) -> str:
        """Score the test list into a table."""
        from ivdr_deploy.scoring import read_scores

        out = self.out / "scores"
        run(IVDR, "score", self.bundle, self.test, "-o", out, "--top-k", "1")
        self.labels["score"] = [row[0] for row in read_scores(out)["labels"].to_pylist()]
        return f"wrote {out}"

    def agree(self) -> str:
        """Compare the labels that torch, the bundle, the score table and the endpoint gave."""
        labels = self.labels
        uris = [item.uri for item in self._list().items]
        differing = [
            uri for uri, *answers in zip(uris, *labels.values(), strict=True) if len(set(answers)) > 1
        ]
        self.facts["label_differences"] = differing
        if differing:
            raise StepError(f"{', '.join(labels)} differ on {differing}")
        return f"the same label for each of {len(uris)} test videos from {', '.join(labels)}"

    def bench(self) -> str:
        """Measure latency by stage, engine against torch."""
        report = self.out / "bench.json"
        run(IVDR, "bench", self.bundle, "--videos", self.test, "--rounds", "1", "-o", report)
        return f"wrote {report}"

    def _list(self) -> VideoList:
        return read_video_list(self.test)

    def _videos(self) -> list[Path] | list[Pattern]:
        """Return the test videos as words of a command line."""
        return [self.pattern] if self.pattern else [item.path for item in self._list().items]


def _shortened(body: dict[str, Any]) -> str:
    """Spell an answer with its long vectors cut, for reading."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, float):
            return round(value, 4)
        if not isinstance(value, list):
            return value
        if all(isinstance(item, float) for item in value):
            shown = [f"{item:.3f}" for item in value[:3]]
            return f"[{', '.join(shown)}{', ...' if len(value) > 3 else ''}] ({len(value)})"
        return [*(cut(item) for item in value[:2]), *([f"... {len(value)} in all"] if len(value) > 2 else [])]

    return json.dumps(cut(body), indent=2, ensure_ascii=False)
