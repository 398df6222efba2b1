"""De-identification of the cases of one run: the clean ones go on, those in doubt are put aside.

Goes in: a config, the label set, the run's spool and its cases. Comes out: cases with surrogates, counts and measured
recall, and a version of `quarantine` with what nobody can be sure of.
"""

import collections
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mint_lib.case_spool import CaseSpool
from mint_lib.code_version import code_version
from mint_lib.deidentification.config import DeidentificationConfig, read_key
from mint_lib.deidentification.deidentifier import Deidentifier, Unsure
from mint_lib.deidentification.vocabulary import digest_vocabulary
from mint_lib.records import Case, Label, StageRecord
from mint_lib.rows import case_schema

if TYPE_CHECKING:
    from mint_lib.store import Store

logger = logging.getLogger(__name__)


class Cleaning:
    """De-identification of the cases of one run; what it is not sure of is kept apart, in the spool."""

    def __init__(self, config: DeidentificationConfig, labels: Sequence[Label], spool: CaseSpool):
        """Prepare, and measure the recall.

        Raises:
            InvalidInput: the environment holds no key.
            GateFailed: the recall is below what the config asks for.
        """
        phrases = [word for label in labels for word in (label.name, *label.synonyms)]
        self._deidentifier = Deidentifier(config, key=read_key(), known_phrases=phrases)
        figures = self._deidentifier.check_recall()
        low, high = figures.recall.interval()
        self.metrics = {
            "deidentification_recall": figures.recall.value,
            "deidentification_recall_low": low,
            "deidentification_recall_high": high,
            "deidentification_precision": figures.precision.value,
        }
        self.counts: collections.Counter[str] = collections.Counter()
        self.inputs = {"deidentification/words": digest_vocabulary()}
        self._spool = spool
        self._unsure: list[int] = []
        self._causes: dict[str, list[str]] = collections.defaultdict(list)

    def clean(self, case: Case) -> Case | None:
        """The case with surrogates; None where it is put aside."""
        outcome = self._deidentifier.clean_case(case)
        if isinstance(outcome, Unsure):
            self._unsure.append(self._spool.append(case))
            self._causes[outcome.cause].append(case.case_id)
            self.counts[f"deidentification/unsure/{outcome.cause}"] += 1
            return None
        self.counts.update({f"deidentification/replaced/{kind}": count for kind, count in outcome.counts.items()})
        self.counts["deidentification/cases"] += 1
        return outcome.case

    def set_aside(self, store: "Store", name: str, *, config: dict[str, object], inputs: dict[str, str]) -> None:
        """Write the cases in doubt, as they came, to the version `name` of `quarantine`, which only people read."""
        if not self._unsure:
            return
        record = StageRecord(
            stage="data",
            config=config,
            inputs=inputs,
            code_version=code_version(),
            counts={f"unsure/{cause}": len(ids) for cause, ids in sorted(self._causes.items())},
            notes=("Texts as they came: they may identify patients. Look at each and correct its source.",),
        )
        with store.write("quarantine", name) as version:
            version.add_rows("unsure", map(self._spool.read, self._unsure), case_schema())
            version.add_json("causes.json", dict(sorted(self._causes.items())))
            reference = version.commit(record)
        logger.warning(
            "data: %d cases are put aside in %s: they may not be de-identified", len(self._unsure), reference
        )

    def describe(self) -> str:
        """What a reader of the card must know."""
        recall, low, high = (self.metrics[f"deidentification_recall{end}"] for end in ("", "_low", "_high"))
        return (
            f"De-identified with surrogates: {self.counts['deidentification/cases']} cases; {len(self._unsure)} more "
            f"were put aside. Recall {recall:.4f} ({low:.4f} to {high:.4f}) on invented held-out notes; no claim about "
            "real ones."
        )
