"""Verifies every checksum of a checkpoint, reports all damage, and finds an intact checkpoint beside a damaged one."""

from lightning_memload.verify.siblings import (
    Siblings,
    Verdict,
    find_siblings,
    fingerprint,
    is_training_checkpoint,
    judge_sibling,
    list_siblings,
)
from lightning_memload.verify.verification import VerifyReport, verify_checkpoint

__all__ = [
    "Siblings",
    "Verdict",
    "VerifyReport",
    "find_siblings",
    "fingerprint",
    "is_training_checkpoint",
    "judge_sibling",
    "list_siblings",
    "verify_checkpoint",
]
