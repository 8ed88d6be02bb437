"""A plan of a scoring run, for tests that need one."""

from ivdr_deploy.scoring.plan import RunPlan
from ivdr_deploy.spec import ViewPlan

PLAN = RunPlan(
    ivdr_version="0.1.0",
    model="tiny",
    model_version="1.0",
    model_sha256="bb",
    variant="onnx-fp32",
    runtime="onnxruntime 1.32.0, CPUExecutionProvider, fp32",
    contract_hash="cc",
    view_plan=ViewPlan(num_clips=2),
    top_k=2,
    hash_files=False,
    decoder="pyav",
)
