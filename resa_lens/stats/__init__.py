"""All resampling of the project: intervals, paired comparisons, permutation p-values.

Every function takes numpy arrays (or what numpy can read) and a seed, and returns plain floats or
frozen dataclasses.  Shapes: ``n`` questions, ``samples`` answers per question, ``draws`` resamples.
"""

from __future__ import annotations

from resa_lens.stats.arrays import (
    DRAWS,
    Floats,
    Interval,
    Seed,
)
from resa_lens.stats.equivalence import (
    Equivalence,
    equivalence_test,
    noninferiority_p,
)
from resa_lens.stats.exchange import (
    centred_within,
    position_exchanges,
    positions_of,
)
from resa_lens.stats.multiple import (
    SelectionBias,
    benjamini_hochberg,
    best_of_noise,
    expected_maximum,
    holm,
    selection_bias,
    simultaneous_quantile,
)
from resa_lens.stats.oneway import (
    OneWay,
    one_way,
    one_way_f,
    one_way_permutation,
    one_way_power,
)
from resa_lens.stats.paired import (
    FEW,
    PairedComparison,
    SetDifference,
    compare_paired,
    difference_from_sets,
    mcnemar_exact,
    paired_bootstrap,
    paired_interval,
)
from resa_lens.stats.power import (
    TARGET,
    PairedPower,
    least_detectable,
    mcnemar_detectable,
    mcnemar_power,
    mcnemar_questions,
    paired_power,
    questions_with_seeds,
)
from resa_lens.stats.proportions import (
    clopper_pearson,
    fisher_greater,
    score_statistic,
    tango_interval,
    wilson_interval,
)
from resa_lens.stats.resampling import (
    TailCounts,
    bootstrap_mean_interval,
    bootstrap_means,
    circular_shifts,
    multinomial_draws,
    percentile_interval,
    permutation_draws,
    permutation_p_value,
    sign_flip_p_value,
    spearman,
)
from resa_lens.stats.samples import (
    macro_average,
    mean_interval,
    pass_at_k,
    t_test,
)
from resa_lens.stats.seeds import (
    GroupDifference,
    group_difference,
)
from resa_lens.stats.sweeps import (
    Correlation,
    LayerEffect,
    SweepDifferences,
    SweepPower,
    layer_effect,
    profile_correlation,
    shuffled_within_questions,
    sweep_differences,
    sweep_power,
)

__all__ = [
    "DRAWS",
    "FEW",
    "TARGET",
    "Correlation",
    "Equivalence",
    "Floats",
    "GroupDifference",
    "Interval",
    "LayerEffect",
    "OneWay",
    "PairedComparison",
    "PairedPower",
    "Seed",
    "SelectionBias",
    "SetDifference",
    "SweepDifferences",
    "SweepPower",
    "TailCounts",
    "benjamini_hochberg",
    "best_of_noise",
    "bootstrap_mean_interval",
    "bootstrap_means",
    "centred_within",
    "circular_shifts",
    "clopper_pearson",
    "compare_paired",
    "difference_from_sets",
    "equivalence_test",
    "expected_maximum",
    "fisher_greater",
    "group_difference",
    "holm",
    "layer_effect",
    "least_detectable",
    "macro_average",
    "mcnemar_detectable",
    "mcnemar_exact",
    "mcnemar_power",
    "mcnemar_questions",
    "mean_interval",
    "multinomial_draws",
    "noninferiority_p",
    "one_way",
    "one_way_f",
    "one_way_permutation",
    "one_way_power",
    "paired_bootstrap",
    "paired_interval",
    "paired_power",
    "pass_at_k",
    "percentile_interval",
    "permutation_draws",
    "permutation_p_value",
    "position_exchanges",
    "positions_of",
    "profile_correlation",
    "questions_with_seeds",
    "score_statistic",
    "selection_bias",
    "shuffled_within_questions",
    "sign_flip_p_value",
    "simultaneous_quantile",
    "spearman",
    "sweep_differences",
    "sweep_power",
    "t_test",
    "tango_interval",
    "wilson_interval",
]
