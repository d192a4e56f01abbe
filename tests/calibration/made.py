"""A calibration whose curves a test knows: the odds of a raw confidence are halved."""

from __future__ import annotations

import math

from qvl.analysis.product import ProductFields
from qvl.calibration import Calibration
from qvl.calibration.calibration_file import (
    AnalysisCalibration,
    DecisionsCalibration,
    FieldCalibration,
    QuestionCalibration,
    asked_json,
    question_key,
)
from qvl.calibration.curve import PlattCurve
from qvl.decisions.questions import Question
from qvl.pipeline.decide_call import PROMPT_VERSION
from qvl.types import JsonObject

HALVED = PlattCurve(slope=1.0, offset=-math.log(2))


def halved(raw: float) -> float:
    return raw / (raw + 2 * (1 - raw))


def calibration_for(identity: JsonObject, *questions: Question) -> Calibration:
    """A calibration of ProductAnalysis's brand and category in English, and of `questions`."""
    field = FieldCalibration(curve=HALVED, labels=100, right=60)
    made = {
        question_key(one): QuestionCalibration(
            curve=HALVED, labels=100, right=60, name=one.name or str(one.instructions), question=asked_json(one)
        )
        for one in questions
    }
    return Calibration(
        backend=identity,
        analysis=AnalysisCalibration(
            prompt_version="product-1",
            language="en",
            schema=ProductFields.model_json_schema(),
            raw_method="token_probability_product",
            answer=field,
            fields={"brand": field, "category": field},
        ),
        decisions=DecisionsCalibration(prompt_version=PROMPT_VERSION, questions=made) if made else None,
    )
