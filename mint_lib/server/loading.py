"""Loads a student by its reference: verified, checked, warmed up, or not at all.

Goes in: a store, a reference of a model or a student, and the server's engines. Comes out: a `ServedStudent` that has
answered once. Files are read through the store, which proves their digests; what they say is checked before a tensor is
read; the libraries are imported while the files come. A load that fails leaves nothing behind.
"""

import dataclasses
import itertools
import logging
import pathlib
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import InvalidInput
from mint_lib.reading import end_of_turn_id
from mint_lib.records import Reference
from mint_lib.server.asking import warm_up
from mint_lib.server.base_files import BaseFiles, digest_weights
from mint_lib.server.engines import BaseKey, Engines, LoadedModel, RunningBase
from mint_lib.server.safe_adapter import check_adapter
from mint_lib.server.stored_student import StoredStudent, read_student
from mint_lib.server.students import Precision, ServedStudent
from mint_lib.student import load_reader
from mint_lib.student import load_student as load_model
from mint_lib.student_weights import TUNED_FOLDERS

if TYPE_CHECKING:
    from mint_lib.server.safe_base import BaseFacts
    from mint_lib.store import Store

logger = logging.getLogger(__name__)
_numbers = itertools.count()


class LoadConfig(BaseModel):
    """How a student is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """A mirrored base in the store, for instance `base/smollm2`; None takes the base from where the student's own
    config names it: a package, a hub, a folder. A student of which all weights were trained needs neither."""
    precision: Literal["trained", "int8"] = "trained"
    """`trained`: that of the training. `int8`: 8-bit weights, if the gate finds that the answers stay the same."""
    abstain_below: float = Field(default=0.0, ge=0.0, le=1.0)
    """The student abstains where its first label is less probable than this."""
    warm_seconds: float = Field(default=120.0, gt=0.0)
    """How long the first answer may take before the student is refused."""


def load_student(store: "Store", text: str, *, name: str, engines: Engines, options: LoadConfig) -> ServedStudent:
    """The student that `text` (a reference, `model/name@alias` and the like) means, answering to `name`.

    Raises:
        InvalidInput: the version is no model or student, a file of it or of its base is refused, or the adapter belongs
            to another base.
        StoreError: the store cannot be read, or a file is not what was committed.
        GateFailed: int8 was asked for and changes the answers.
        ComputationFailed: the student's first answer is no answer.
    """
    started = time.monotonic()
    stored = read_student(store, store.resolve(text))
    facts = stored.facts
    if stored.template.reads != facts.student.reads:
        raise InvalidInput(
            f"{stored.reference} is a student that reads {facts.student.reads}, and its template asks about "
            f"{stored.template.reads}s. Align it with a template that reads what it does."
        )
    if facts.tuning == "full":
        holder: Reference | None = stored.reference
        digest = digest_weights(store, stored.reference, facts.student)
    else:
        holder = store.resolve(options.base) if options.base is not None else None
        digest = facts.base_digest
    first: Precision = facts.student.dtype
    with (
        BaseFiles(store, facts.student, stored=holder, digest=digest) as files,
        ThreadPoolExecutor(1, thread_name_prefix="imports") as pool,
    ):
        # The download begins before the imports, which leave other threads little of the interpreter. A base on this
        # machine may have to be converted, which imports the same libraries: two threads at once see half of them.
        if holder is not None and not engines.has(BaseKey(digest, first)):
            files.start()
        load = _Load(store, stored, digest, name, engines, options, files, pool.submit(import_libraries), started)
        return load.through_gate() if options.precision == "int8" else load.in_precision(first)


def import_libraries() -> None:
    """Import what loading needs and what takes seconds to import."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import mint_lib.engine.scheduler  # noqa: F401


@dataclasses.dataclass(frozen=True)
class _Load:
    """One load under way."""

    store: "Store"
    stored: StoredStudent
    digest: str
    """Of the files that are loaded first: the base's, or the student's own."""
    name: str
    engines: Engines
    options: LoadConfig
    files: BaseFiles
    imports: "Future[None]"
    started: float

    def through_gate(self) -> ServedStudent:
        """The student in int8, after it was compared with itself as it was trained."""
        from mint_lib.server.int8_gate import check_int8

        exact = self.in_precision(self.stored.facts.student.dtype)
        try:
            quantised = self.in_precision("int8")
        except BaseException:
            self.engines.remove(exact)
            raise
        try:
            check_int8(self.store, exact, quantised)
        except BaseException:
            self.engines.remove(quantised)
            raise
        finally:
            self.engines.remove(exact)
        return quantised

    def in_precision(self, precision: Precision) -> ServedStudent:
        """The student, loaded and warm."""
        adapter = f"{self.name}@{self.stored.reference.version}.{next(_numbers)}"
        facts, reference = self.stored.facts, self.stored.reference
        is_merged = facts.tuning == "adapter" and facts.student.reads == "image"
        key = BaseKey(str(reference.digest) if is_merged else self.digest, precision)
        with tempfile.TemporaryDirectory(prefix="mint-adapter-") as scratch:
            folder = None
            if facts.tuning == "adapter":
                folder = self.store.download(reference, pathlib.Path(scratch), prefix=TUNED_FOLDERS["adapter"])
            base = self.engines.hold(key, lambda: self._load_base(precision, folder if is_merged else None))
            try:
                if folder is not None and not is_merged:
                    self._check_adapter(folder, base.facts)
                base.engine.add_adapter(adapter, None if is_merged else folder)
            except BaseException:
                self.engines.let_go(key)
                raise
        try:
            student = self._assemble(base, adapter)
            warm_up(student, timeout_seconds=self.options.warm_seconds)
        except BaseException:
            self.engines.drop(key, adapter, base.engine)
            raise
        seconds = time.monotonic() - self.started
        logger.info("%s answers as %s in %s after %.1f s", self.stored.reference, self.name, precision, seconds)
        return dataclasses.replace(student, load_seconds=seconds)

    def _check_adapter(self, folder: pathlib.Path, base: "BaseFacts") -> None:
        """Refuse an adapter that does not fit its base."""
        student = self.stored.facts.student
        check_adapter(
            folder,
            base_model=student.model,
            num_layers=student.num_layers or base.num_layers,
            base_tensors=base.tensors,
            image_parts=base.image_parts,
        )

    def _load_base(self, precision: Precision, adapter: pathlib.Path | None) -> LoadedModel:
        """The base without adapter, the base with the image student's `adapter` in it, or the whole student.

        All files were checked before anything is made of them.
        """
        import jinja2

        from mint_lib.server.merging import merge_adapter
        from mint_lib.server.safe_base import check_base

        self.imports.result()
        folder = self.files.wait()
        facts, student = check_base(folder), self.stored.facts.student
        if (facts.image_parts is not None) != (student.reads == "image"):
            raise InvalidInput(
                f"{self.stored.reference} is a student that reads {student.reads}, and {student.model} is no model of "
                "that kind. Align it again with a base that is."
            )
        if adapter is not None:
            self._check_adapter(adapter, facts)
        config = student.model_copy(update={"model": f"folder:{folder}", "revision": None})
        reader = load_reader(config)
        try:
            end_of_turn_id(reader.tokenizer)
        except jinja2.TemplateError as error:
            raise InvalidInput(
                f"The chat template of {student.model} cannot be rendered ({type(error).__name__}). "
                "It was refused in the sandbox; choose a base with a plain chat template."
            ) from None
        model = load_model(config, adapter)
        if adapter is not None:
            model = merge_adapter(model, adapter)
        if precision == "int8":
            from mint_lib.engine.quantised import quantise_linears

            quantise_linears(model)
        return LoadedModel(model, reader, facts)

    def _assemble(self, base: RunningBase, adapter: str) -> ServedStudent:
        """The record that requests work with."""
        from mint_lib.engine.answer_format import AnswerFormat
        from mint_lib.engine.label_trie import LabelTrie
        from mint_lib.image_inputs.reader import ImageReader

        stored, facts = self.stored, self.stored.facts
        if facts.student.window_tokens > base.facts.max_window_tokens:
            raise InvalidInput(
                f"{stored.reference} asks for a window of {facts.student.window_tokens} tokens, and its base reads "
                f"{base.facts.max_window_tokens}. Align it with a smaller student.window_tokens."
            )
        calibration = stored.calibration
        tokenizer = base.reader.tokenizer
        return ServedStudent(
            name=self.name,
            reference=stored.reference,
            engine=base.engine,
            adapter=adapter,
            tokenizer=tokenizer,
            image_reader=base.reader if isinstance(base.reader, ImageReader) else None,
            template=stored.template,
            labels=stored.labels,
            trie=LabelTrie.build(tokenizer, stored.template, stored.labels),
            answer_format=AnswerFormat.build(tokenizer, stored.template, stored.labels),
            stop_ids=frozenset({end_of_turn_id(tokenizer), int(tokenizer.eos_token_id)}),
            window_tokens=facts.student.window_tokens,
            temperature=calibration.temperature if calibration is not None else 1.0,
            num_calibration_cases=calibration.num_cases if calibration is not None else 0,
            abstain_below=self.options.abstain_below,
            precision=base.key.precision,
            intended_use=stored.intended_use,
            limits=stored.limits,
            load_seconds=0.0,
        )
