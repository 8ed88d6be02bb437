"""The steps of the demo, in order: each runs the command a person would type, and is judged."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ivdr_deploy._console import console
from ivdr_deploy.cli import app
from ivdr_deploy.datasets.lists import VideoList, read_video_list
from ivdr_deploy.errors import IvdrError
from train.config import FinetuneConfig, PretrainConfig, load_config
from train.evaluate import EvaluationReport, evaluate
from train.finetune import finetune
from train.pretrain import pretrain

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step gave."""

    name: str
    passed: bool
    seconds: float
    detail: str


class StepError(Exception):
    """A step ran and its result is not what it must be."""


@dataclass
class Journey:
    """The demo on one data set.

    Attributes:
        out: Run folder.
        overrides: Settings (``key=value``) for the training in each run folder.
        minimum_accuracy: Video accuracy on the test list below which the demo fails.
        train: Training list.
        test: Test list.
        steps: What was run so far.
        facts: Figures for the report.
        labels: For each way to a label, that of every test video in order.
    """

    out: Path
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    minimum_accuracy: float = 0.0
    train: Path = Path()
    test: Path = Path()
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
        arguments = self._arguments("pretrain")
        self._show("python -m train pretrain --config train/configs/demo_pretrain.toml", *arguments)
        path = pretrain(load_config(PretrainConfig, CONFIGS / "demo_pretrain.toml", arguments))
        return f"wrote {path}"

    def finetune(self) -> str:
        """Train the classifier on the pre-trained backbone."""
        return self._finetune("finetune", init="pretrain")

    def finetune_from_scratch(self) -> str:
        """Do the same without pre-training, to see what it gave."""
        return self._finetune("scratch")

    def finetune_jointly(self) -> str:
        """Go on with all losses for a while: cross-entropy alone has left `inter` and `intra` behind."""
        return self._finetune("joint", init="finetune")

    def _finetune(self, folder: str, *, init: str = "") -> str:
        config = "demo_joint.toml" if folder == "joint" else "demo_finetune.toml"
        arguments = self._arguments(folder)
        if init:
            arguments.append(f"init={self.out / init / 'checkpoint.safetensors'}")
        self._show(f"python -m train finetune --config train/configs/{config}", *arguments)
        return f"wrote {finetune(load_config(FinetuneConfig, CONFIGS / config, arguments))}"

    def evaluate(self) -> str:
        """Measure every stage on the test list."""
        report, tuned, scratch = (self._evaluate(folder) for folder in ("joint", "finetune", "scratch"))
        value = report.video_accuracy.value
        with_it, without = tuned.video_accuracy.value, scratch.video_accuracy.value
        self.facts |= {
            "video_accuracy": value,
            "clip_accuracy": report.clip_accuracy.value,
            "video_accuracy_finetuned_with_pretraining": with_it,
            "video_accuracy_finetuned_without_pretraining": without,
            "pretraining_gain": with_it - without,
            "per_class": report.to_dict()["per_class"],
        }
        detail = (
            f"video accuracy {report.video_accuracy}; fine-tuned with pre-training {with_it:.1%}, "
            f"without {without:.1%}; after the joint stage {value:.1%}"
        )
        if value < self.minimum_accuracy:
            raise StepError(f"{detail}; at least {self.minimum_accuracy:.0%} was expected")
        return detail

    def _evaluate(self, folder: str) -> EvaluationReport:
        checkpoint = self.out / folder / "checkpoint.safetensors"
        self._show(f"python -m train evaluate {checkpoint} --protocol ten-clip", "--data", str(self.test))
        return evaluate(checkpoint, self.test)

    def export(self) -> str:
        """Make the bundle."""
        self._ivdr("export", self.checkpoint, "-o", self.bundle, "--name", "demo")
        return f"wrote {self.bundle}"

    def verify(self) -> str:
        """Compare ONNX Runtime with torch on the golden clips and on every test video."""
        self._ivdr("verify", self.bundle, "--data", self.test)
        return "torch and ONNX Runtime agree on the golden clips and on the test videos"

    def archive(self) -> str:
        """Pack the bundle for TorchServe."""
        self._ivdr("archive", self.bundle, "--model-store", self.out / "model_store")
        return f"wrote {self.out / 'model_store' / 'demo.mar'}"

    def predict(self) -> str:
        """Label every test video, with torch and with ONNX Runtime."""
        for name, artifact in (("torch", self.checkpoint), ("onnx", self.bundle)):
            lines = self._ivdr("predict", artifact, *self._videos(), "--json", "--top-k", "1")
            self.labels[name] = [json.loads(line)["predictions"][0]["label"] for line in lines.splitlines()]
        return f"{len(self._videos())} videos labelled by each"

    def serve(self) -> str:
        """Start the real TorchServe and send it every test video over HTTP."""
        from ivdr_deploy.serving.torchserve.process import serve

        archive = self.out / "model_store" / "demo.mar"
        self._show(f"ivdr serve {archive}")
        labels = []
        with serve(archive, run_dir=self.out / "serve") as server:
            console.print(f"READY at {server.url}", markup=False)
            for number, item in enumerate(self._list().items):
                options = {"timings": True, "outputs": ["labels", "inter", "intra"]} if number == 0 else None
                status, body = server.client.predict(item.path, options=options)
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
        from ivdr_deploy.scoring.sink import read_scores

        out = self.out / "scores"
        shutil.rmtree(
            out, ignore_errors=True
        )  # an earlier demo's: another model, which scoring would refuse to mix
        self._ivdr("score", self.bundle, self.test, "-o", out, "--top-k", "1")
        self.labels["score"] = [row[0] for row in read_scores(out)["labels"].to_pylist()]
        return f"wrote {out}"

    def agree(self) -> str:
        """Compare the labels that torch, ONNX Runtime, the score table and the endpoint gave."""
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
        self._ivdr("bench", self.bundle, "--data", self.test, "--rounds", "1", "-o", report)
        return f"wrote {report}"

    def _arguments(self, folder: str) -> list[str]:
        """Return the settings of the training whose run folder is ``folder``, as ``key=value``."""
        fixed = (f"out={self.out / folder}", f"data.train={self.train}", f"data.cache={self.out / 'cache'}")
        return [*fixed, *self.overrides.get(folder, ())]

    def _list(self) -> VideoList:
        return read_video_list(self.test)

    def _videos(self) -> list[str]:
        return [str(item.path) for item in self._list().items]

    def _show(self, *command: str) -> None:
        console.print("$ " + " ".join(command), style="bold cyan", markup=False)

    def _ivdr(self, *arguments: str | Path) -> str:
        """Run one ``ivdr`` command in this process and return its stdout.

        Raises:
            StepError: if it exits with another code than 0.
        """
        words = [str(argument) for argument in arguments]
        shown = shlex.join(words)
        self._show("ivdr", shown if len(shown) < 400 else f"{shown[:160]} ... {shown[-80:]}")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = app(args=words, prog_name="ivdr", standalone_mode=False)
        if code:
            raise StepError(f"ivdr {words[0]} ended with exit code {code}")
        return printed.getvalue()


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
