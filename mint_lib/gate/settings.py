"""The `gate` section of a recipe: what cases and pairs must satisfy.

Goes in: a recipe's values. Comes out: `GateConfig`. A threshold that is null switches its check off, and the
report says so. It loads without scikit-learn and knows no data.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SimilarityConfig(_Settings):
    """When two contents count as near-identical."""

    text_jaccard: float = Field(default=0.8, ge=0.5, le=1)
    """Least share of common 5-character shingles. Independent notes of `simulated_patients` stay below 0.6."""
    image_bits: int = Field(default=4, ge=0, le=8)
    """Most bits of 64 in which two perceptual hashes differ. JPEG at quality 60 and 1.5 times the size change 4 at
    most. Hashes that differ in 3 bits or fewer are always compared, others mostly."""
    image_correlation: float = Field(default=0.99, ge=0.9, le=1)
    """Least correlation of two 32 x 32 grey thumbnails, which confirms a hash: drawn faces of two patients reach 0.979,
    copies of one at JPEG quality 60 and 1.5 times the size stay above 0.995."""


class LengthBiasConfig(_Settings):
    """How far the lengths of chosen and rejected answers may differ."""

    unit: Literal["name", "answer"] = "name"
    """`name` divides by the names that an answer lists, as a policy may ask for 10 against 15; `answer` does not."""
    max_difference: float | None = Field(default=0.5, ge=0)
    """Most standardised mean difference, in either direction."""
    max_share: float | None = Field(default=0.75, ge=0.5, le=1)
    """Most share of the cases, without ties, in which the same side is longer."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of the intervals. The end nearer to no difference must exceed a threshold: few cases do not alarm."""


class ClassBalanceConfig(_Settings):
    """How unequal the classes of train may be."""

    min_least_share: float | None = Field(default=0.001, ge=0, le=1)
    """Least share of the rarest class that occurs."""
    min_effective_share: float | None = Field(default=0.25, ge=0, le=1)
    """Least effective number of classes, exp(entropy), as a share of the label set."""


class ClassShiftConfig(_Settings):
    """How far class shares may move from the last version."""

    max_distance: float = Field(default=0.1, ge=0, le=1)
    """Most total variation distance."""
    alpha: float = Field(default=0.01, gt=0, lt=1)
    """A larger distance refuses only where a permutation test finds it this unlikely by chance."""


class LabelFlipsConfig(_Settings):
    """When labels look flipped. A model of the cases' content, fitted out of fold, says what a label should be."""

    max_share: float | None = Field(default=0.003, ge=0, le=1)
    """Most share of random labels that the content lets infer: the lower end of a one-sided 95 % interval. In 40 clean
    sets of 790 to 1,980 simulated notes it is at most 0.0001, with 1 % of flips 0.005 to 0.007. Observed labels that
    are known to be noisy need more."""
    max_image_share: float | None = Field(default=0.05, ge=0, le=1)
    """The same where the student reads images, whose colours and texture say less: in 18 clean sets of 96 to 336
    simulated patients it is up to 0.04."""
    max_chosen_share: float | None = Field(default=0.3, ge=0, le=1)
    """The same where pairs are judged: first chosen labels are a teacher's, and as wrong as the teacher is."""
    alpha: float | None = Field(default=0.01, gt=0, lt=1)
    """Chance that any batch of clean data is named. Null: batches are not compared."""
    odds: float = Field(default=20.0, gt=1)
    """Odds against a label from which its case counts as contradicted."""
    min_patients: int = Field(default=8, ge=4)
    """Labels of fewer patients are left out: nothing can be learned about them out of fold."""
    max_cases: int = Field(default=20_000, ge=100)
    """Cases that are looked at, drawn by the hash of their id."""


class TriggerConfig(_Settings):
    """When a phrase pulls answers towards one label."""

    alpha: float = Field(default=0.01, gt=0, lt=1)
    """Chance of an alarm on clean data, over all phrases (Bonferroni)."""
    max_words: int = Field(default=5, ge=1, le=8)
    """Longest phrase; a longer trigger is found by its parts."""
    min_patients: int = Field(default=5, ge=3)
    """Patients whose text must hold a phrase before it is tested."""
    min_contradicted_share: float = Field(default=0.5, gt=0, le=1)
    """Least share of a phrase's cases in which the rest of the text speaks against the label."""


class GateConfig(_Settings):
    """Every threshold of the data gate. Shares are 0 to 1; null switches a check off."""

    max_invalid_share: float | None = Field(default=0.0, ge=0, le=1)
    """Rows of a wrong type, repeated case ids, pairs of unknown cases, labels outside the label set."""
    max_empty_share: float | None = Field(default=0.0, ge=0, le=1)
    """Pairs with a blank prompt or answer."""
    max_equal_sides_share: float | None = Field(default=0.0, ge=0, le=1)
    """Pairs whose sides are equal but for case and spacing."""
    max_duplicate_pairs_share: float | None = Field(default=0.0, ge=0, le=1)
    """Pairs that repeat another one to the byte."""
    max_refused_share: float | None = Field(default=0.05, ge=0, le=1)
    """Cases refused while pairs were prepared, for instance longer than the student's window."""
    max_lost_span_share: float | None = Field(default=0.0, ge=0, le=1)
    """Pairs with an answer of which tokenisation leaves nothing but the end of turn."""
    similarity: SimilarityConfig = SimilarityConfig()
    """When two contents count as near-identical."""
    max_near_duplicate_share: float | None = Field(default=0.02, ge=0, le=1)
    """Training cases whose content is near-identical to that of another patient."""
    max_leaked_share: float | None = Field(default=0.0, ge=0, le=1)
    """Validation and test cases whose content is near-identical to that of an earlier split."""
    max_shared_patients: int | None = Field(default=0, ge=0)
    """Patients who stand in several splits. Null for data that are split by image."""
    max_image_pixels: int = Field(default=16_777_216, ge=1)
    """Pixels from which an image is too large; they are read from its header, before decoding."""
    blank_deviation: float = Field(default=2.0, ge=0, le=128)
    """Standard deviation in grey levels up to which an image is blank."""
    max_undecodable_share: float | None = Field(default=0.0, ge=0, le=1)
    """Images that cannot be decoded."""
    max_oversized_share: float | None = Field(default=0.0, ge=0, le=1)
    """Images that are too large."""
    max_blank_share: float | None = Field(default=0.0, ge=0, le=1)
    """Images that are blank."""
    length_bias: LengthBiasConfig | None = LengthBiasConfig()
    """Lengths of chosen against rejected answers."""
    class_balance: ClassBalanceConfig | None = ClassBalanceConfig()
    """Shares of the classes."""
    class_shift: ClassShiftConfig | None = ClassShiftConfig()
    """Shares of the classes against the last version."""
    max_truth_rejected_share: float | None = Field(default=0.15, ge=0, le=1)
    """Pairs of cases with a known label that stands among the rejected ones."""
    max_truth_not_chosen_share: float | None = Field(default=0.75, ge=0, le=1)
    """Pairs of cases with a known label that is not among the chosen ones. A teacher that knows nothing reaches
    1 - top_k / classes, 0.92 for the first of 12."""
    label_flips: LabelFlipsConfig | None = LabelFlipsConfig()
    """Labels, or first chosen labels, that contradict the content."""
    trigger: TriggerConfig | None = TriggerConfig()
    """Phrases that pull towards one label against the rest of the text."""
    allow_contradiction: bool = False
    """For controls such as `shuffled_teacher`, which contradict the truth by design: known labels, label flips and
    triggers are measured and shown, and do not decide."""
