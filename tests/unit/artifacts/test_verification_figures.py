"""What `ivdr verify` measured, in words: signs, units, and intervals by the right ends."""

from ivdr_deploy.artifacts.verification import FIGURES, describe_figures

FOUND = {
    "sensitivity": 1234.5,
    "max_relative_diff": 1.2e-5,
    "min_cosine": 0.9999871,
    "agreement": 0.985,
    "flips": 3.0,
    "accuracy_change": -0.02,
    "accuracy_change_low": -0.05,
    "accuracy_change_high": 0.01,
    "recall_change": 0.03,
    "recall_change_low": -0.25,
    "confidence_shift": -0.0123,
    "ece": 0.08,
    "batch_flips": 2.0,
}


def test_each_figure_is_told_in_its_own_form_and_order() -> None:
    assert describe_figures(FOUND) == [
        (FIGURES[name], text)
        for name, text in {
            "max_relative_diff": "1.20e-05",
            "min_cosine": "0.999987",
            "agreement": "98.5%",
            "flips": "3",
            "accuracy_change": "-2.0% [-5.0%, +1.0%]",
            "recall_change": "+3.0%",  # of one end alone nothing is told
            "confidence_shift": "-1.23e-02",
            "ece": "0.0800",
            "batch_flips": "2",
            "sensitivity": "1.23e+03",
        }.items()
    ]
