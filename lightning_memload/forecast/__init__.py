"""Tells before a resume how much memory it will need, in each way, and whether that is free."""

from lightning_memload.forecast.resume_plan import PlannedWay, ResumePlan, plan_resume

__all__ = ["PlannedWay", "ResumePlan", "plan_resume"]
