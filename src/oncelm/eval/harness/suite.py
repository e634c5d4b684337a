"""Sets of lm-eval tasks as a run of ours: one line a question, on disk before the next batch is asked.

lm-eval gives the questions, the prompts and the judgement; a result file, resumed after a kill, and a report are ours.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from oncelm.eval.examples import Example, Output, Score, Scores
from oncelm.eval.fields import NUMBER, TEXT, Kinds, check_fields
from oncelm.eval.harness.folder import check_folder, folder_task
from oncelm.eval.harness.hub import hub_tasks
from oncelm.eval.papers import LONGLLAMA_LM_EVAL, YOCO_LM_EVAL
from oncelm.eval.results import Run
from oncelm.eval.statistics import estimate
from oncelm.eval.task import Task, default_views, option
from oncelm.eval.views import Sample, Table, View, group, plain
from oncelm.utils.errors import check_choice, unknown

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask

    from oncelm.eval.model import Codec, LanguageModel

QUESTIONS_AT_ONCE = 128  # scored together; what a kill can lose
SEED = 1234  # of lm-eval's choice of examples; ours is added
HFLM_BATCH = 16
SCORERS = ("auto", "oncelm", "hflm")


@dataclass(frozen=True)
class TaskSuite(Task):
    """Questions of lm-eval, from the hub or from a folder; a limit counts the questions of each of its tasks."""

    data: str = option("", "folder of questions, for work without a network; without it, lm-eval asks the hub")
    fewshot: int = option(0, "examples before each question", least=0, most=1000)
    only: str = option("", "some of the tasks, separated by commas")
    scorer: str = option("auto", "oncelm, hflm (lm-eval's own), or auto: hflm for models of transformers")

    by: ClassVar[tuple[str, ...]] = ("task",)
    tag_kinds: ClassVar[Kinds] = {"task": TEXT}
    columns: ClassVar[tuple[tuple[str, str, str], ...]]  # head, task of lm-eval, metric
    published: ClassVar[dict[str, tuple[float, ...]]]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scorer", self.scorer, SCORERS)
        if self.data:
            check_folder(self.data, self.tasks(), self.fewshot)
        else:
            self.tasks()

    def tasks(self) -> list[str]:
        """Names of lm-eval's tasks to ask."""
        own = list(dict.fromkeys(task for _, task, _ in self.columns))
        chosen = split_names(self.only) or own
        for name in chosen:
            if name not in own:
                raise unknown(f"task of {self.name}", name, own)
        return chosen

    def longest(self) -> int | None:
        return None

    def examples(self, codec: Codec, seed: int) -> Iterable[Example]:
        """None: the questions come from `answers`."""
        return ()

    def score(self, example: Example, output: Output) -> Scores:
        raise TypeError(f"{self.name} is judged by lm-eval.")

    def answers(
        self, model: LanguageModel, seed: int, done: Mapping[int, Sample], limit: int | None, max_tokens: int | None
    ) -> tuple[int, Iterator[list[Sample]]]:
        with quiet():
            tasks = self._load(seed)
            lm = self._scorer(model, max_tokens)
        sizes = [len(task.eval_docs) for task in tasks.values()]
        total = sum(size if limit is None else min(size, limit) for size in sizes)

        def batches() -> Iterator[list[Sample]]:
            first = 0  # index of the task's first question
            for (name, task), size in zip(tasks.items(), sizes, strict=True):
                yield from _ask_task(lm, model, name, task, first, done, limit, max_tokens)
                first += size

        return total, batches()

    def _scorer(self, model: LanguageModel, max_tokens: int | None) -> LM:
        from oncelm.eval.harness.adapter import UNBOUNDED, OnceLM

        if self.scorer == "oncelm" or (self.scorer == "auto" and model.family.has_own_cache):
            return OnceLM(model, max_tokens or UNBOUNDED)
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=model.model,
            tokenizer=model.codec.tokenizer,
            batch_size=HFLM_BATCH,
            max_length=max_tokens,
        )

    def _load(self, seed: int) -> dict[str, ConfigurableTask]:
        """lm-eval's tasks by name, with data."""
        if self.data:
            tasks = {name: folder_task(self.data, name, self.fewshot) for name in self.tasks()}
        else:
            tasks = hub_tasks(self.tasks(), self.fewshot)
        for task in tasks.values():
            task.set_fewshot_seed(SEED + seed)
        return tasks

    @classmethod
    def check(cls, sample: Sample) -> None:
        super().check(sample)
        metrics = [metric for _, task, metric in cls.columns if task == sample["tags"]["task"]]
        check_fields("scores", sample["scores"], dict.fromkeys(metrics, NUMBER))

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        return [accuracy_table(cls.name, cls.columns, runs, cls.published)]


@dataclass(frozen=True)
class YocoTable(TaskSuite):
    """The paper's eight tasks (acc; HellaSwag: acc_norm) and their average."""

    name: ClassVar[str] = "yoco-table"
    summary: ClassVar[str] = "YOCO's eight tasks of lm-eval, zero-shot: ARC, BoolQ, HellaSwag, ..."
    columns = (
        ("ARC-c", "arc_challenge", "acc"), ("ARC-e", "arc_easy", "acc"), ("BoolQ", "boolq", "acc"),
        ("HellaSwag", "hellaswag", "acc_norm"), ("OBQA", "openbookqa", "acc"), ("PIQA", "piqa", "acc"),
        ("Winogrande", "winogrande", "acc"), ("SciQ", "sciq", "acc"),
    )  # fmt: skip
    published = YOCO_LM_EVAL


@dataclass(frozen=True)
class LongLlamaTable(TaskSuite):
    """The paper's tasks and metrics, and the average of all columns."""

    name: ClassVar[str] = "longllama-table"
    summary: ClassVar[str] = "LongLLaMA's tasks of lm-eval: ANLI, ARC, BoolQ, ReCoRD, RTE, TruthfulQA, ..."
    columns = (
        ("anli_r1", "anli_r1", "acc"), ("anli_r2", "anli_r2", "acc"), ("anli_r3", "anli_r3", "acc"),
        ("arc_c", "arc_challenge", "acc"), ("arc_c norm", "arc_challenge", "acc_norm"),
        ("arc_e", "arc_easy", "acc"), ("arc_e norm", "arc_easy", "acc_norm"),
        ("boolq", "boolq", "acc"), ("hellaswag", "hellaswag", "acc"), ("hellaswag norm", "hellaswag", "acc_norm"),
        ("obqa", "openbookqa", "acc"), ("obqa norm", "openbookqa", "acc_norm"),
        ("piqa", "piqa", "acc"), ("piqa norm", "piqa", "acc_norm"), ("record em", "record", "em"),
        ("record f1", "record", "f1"), ("rte", "rte", "acc"), ("truthfulqa mc1", "truthfulqa_mc1", "acc"),
        ("truthfulqa mc2", "truthfulqa_mc2", "acc"), ("wic", "wic", "acc"), ("winogrande", "winogrande", "acc"),
    )  # fmt: skip
    published = LONGLLAMA_LM_EVAL


@dataclass(frozen=True)
class AnyTasks(TaskSuite):
    """Tasks of lm-eval whose metrics are means over questions."""

    name: ClassVar[str] = "harness"
    summary: ClassVar[str] = "any tasks of lm-eval: --only lambada_openai,mmlu_anatomy"
    columns = ()
    published: ClassVar[dict[str, tuple[float, ...]]] = {}

    def tasks(self) -> list[str]:
        if names := split_names(self.only):
            return names
        raise ValueError("harness needs the names of lm-eval's tasks: --only NAME,NAME.")

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        return default_views(cls.name, cls.by, runs)


def split_names(text: str) -> list[str]:
    """ "a, b" as ["a", "b"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


# -- asking -----------------------------------------------------------------------------------------------------------


def _ask_task(
    lm: LM,
    model: LanguageModel,
    name: str,
    task: ConfigurableTask,
    offset: int,
    done: Mapping[int, Sample],
    limit: int | None,
    max_tokens: int | None,
) -> Iterator[list[Sample]]:
    """Lines of the questions of a task, numbered from `offset`, a block at a time."""
    import torch

    with quiet():
        task.build_all_requests(limit=limit)
    documents = ((doc_id, list(asked)) for doc_id, asked in groupby(task.instances, key=lambda one: one.doc_id))
    left = []
    for doc_id, asked in documents:
        index = offset + doc_id
        if index not in done:
            left.append((index, asked))
        elif done[index].get("prompt_hash") != _hash(model, asked):
            raise ValueError(
                f"the result file belongs to another run: its sample {index} has another prompt, so the questions of "
                f"{name} have changed. Name another file with --out."
            )
    blocks = iter(left)
    while block := list(islice(blocks, QUESTIONS_AT_ONCE)):
        start = time.perf_counter()
        kind = block[0][1][0].request_type  # all requests of a task are of one kind
        requests = [request for _, asked in block for request in asked]
        tokens = _tokens(model, requests)
        longest = max(tokens)
        if max_tokens is not None and longest > max_tokens:
            raise ValueError(
                f"{name} has a text of {longest:,} tokens, longer than {model.name} was made for ({max_tokens:,}: its "
                "max_position_embeddings); ask for fewer examples, or allow it with --beyond-trained-length."
            )
        try:
            with quiet():
                responses = getattr(lm, kind)(requests, disable_tqdm=True)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory at questions of {name} of up to {longest:,} tokens; those before are kept, and the "
                "same command goes on from there."
            ) from error
        seconds = (time.perf_counter() - start) / len(block)
        answered = iter(zip(responses, tokens, strict=True))
        lines = []
        for index, asked in block:
            results, lengths = zip(*islice(answered, len(asked)), strict=True)
            lines.append(_line(model, name, task, index, asked, list(results), max(lengths), seconds))
        yield lines


def _line(
    model: LanguageModel,
    name: str,
    task: ConfigurableTask,
    index: int,
    asked: list[Instance],
    results: list[Any],
    tokens: int,
    seconds: float,
) -> Sample:
    """A question's line: lm-eval's metrics, and what they were made of."""
    doc = asked[0].doc
    scores: dict[str, Any] = {}
    for metric, value in task.process_results(doc, results).items():
        if not isinstance(value, int | float | np.number | bool):
            raise ValueError(
                f"{metric} of {name} is no mean over questions; evaluate it with lm_eval.simple_evaluate and "
                "oncelm.eval.harness.OnceLM."
            )
        scores[metric] = float(value)
    output = None
    if asked[0].request_type == "loglikelihood":
        scores["log_likelihoods"] = [float(value) for value, _ in results]
        if len(results) > 1:
            best = asked[int(np.argmax(scores["log_likelihoods"]))]
            inside = len({request.args[1] for request in asked}) == 1  # choices are parts of prompts, not what follows
            output = best.args[0][-80:] + best.args[1] if inside else best.args[1]
    elif isinstance(results[0], str):
        output = results[0]
    return {
        "index": index,
        "prompt_hash": _hash(model, asked),
        "prompt_tokens": tokens,
        "tags": {"task": name},
        "target": _target(task, doc),
        "output": output,
        "scores": scores,
        "seconds": round(seconds, 6),
    }


def _tokens(model: LanguageModel, requests: Sequence[Instance]) -> list[int]:
    """Tokens of all the text of each request."""
    texts = ["".join(part for part in request.args if isinstance(part, str)) for request in requests]
    return [len(model.codec.prefix) + count for count in model.codec.counts(texts)]


def _target(task: ConfigurableTask, doc: Any) -> str:
    """The right answer as text."""
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int):
        return str(task.doc_to_choice(doc)[target])
    return str(target)


def _hash(model: LanguageModel, asked: Sequence[Instance]) -> str:
    """Of all that a question asks."""
    texts = "\0".join(str(part) for request in asked for part in request.args)
    ids = np.frombuffer(texts.encode(), np.uint8).astype(np.int32)
    return Score(ids, ids[:0]).hash()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, lm-eval and transformers speak of errors only, and lm-eval shows no bars."""
    try:
        import lm_eval.api.task
    except ImportError as error:
        raise ImportError(f"lm-eval's tasks need a package: pip install 'oncelm[eval]' ({error}).") from error
    from oncelm.models.load import quiet_transformers

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bar, lm_eval.api.task.tqdm = lm_eval.api.task.tqdm, lambda items, **_: items
    try:
        with quiet_transformers():
            yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar


# -- what a report shows ----------------------------------------------------------------------------------------------


def accuracy_table(
    title: str,
    columns: Sequence[tuple[str, str, str]],
    runs: Sequence[Run],
    published: Mapping[str, Sequence[float]],
) -> Table:
    """A row a metric of a task, and the average; a column a run, then one a published model."""
    labels, found = [], []
    for run in runs:
        by_task = group(run.samples.values(), ("task",))
        values = [[s["scores"][metric] for s in by_task.get((task,), ())] for _, task, metric in columns]
        found.append([estimate(v) if v else None for v in values])
        options = run.configuration["options"]
        shots, scorer = options.get("fewshot"), options.get("scorer", "auto")
        named = "" if scorer == "auto" else f", by {scorer}"
        labels.append(run.label + (f", {shots}-shot" if shots else "") + named)
    rows = [
        [
            head,
            *("" if (e := of[i]) is None else plain(e) for of in found),
            *(f"{row[i]:.3f}" for row in published.values()),
        ]
        for i, (head, _, _) in enumerate(columns)
    ]
    averages = []
    for of in found:
        means = [e.mean for e in of if e is not None]
        averages.append(f"{sum(means) / len(means):.3f}" if len(means) == len(columns) else "")
    rows.append(["average", *averages, *(f"{row[-1]:.3f}" for row in published.values())])
    quoted = f" As published, zero-shot: {', '.join(published)}." if published else ""
    return Table(title, ["task", *labels, *published], rows, note=f"Mean (95 % interval).{quoted}")
