"""What is read of the text of a compiled program, on one written by hand."""

import pytest

from safetydpo_jax.plan.chips import CHIPS
from safetydpo_jax.plan.cost import cost_of, splash

pytestmark = pytest.mark.usefixtures("optimised")

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %e = f32[8]{0} exponential(%p), backend_config={"estimated_cycles":"999"}
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s.1 = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s.1), index=1
  %y = f32[8]{0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/down/attn1/while/body/exp"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%i, %y)
}

%endless (s: (s32[], f32[8])) -> pred[] {
  ROOT %p.2 = pred[]{:T(512)} parameter(0)
}

ENTRY %main.1_spmd (a: f32[8], b: bf16[4,8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  %w = (s32[]{:T(128)}, f32[8]{0}) while(%a), condition=%condition, body=%body
  %v = (s32[]{:T(128)}, f32[8]{0}) while(%a), condition=%endless, body=%body
  %conv = bf16[2,64,64,320]{3,2,1,0:T(8,128)(2,1)} fusion(%b), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/resnets.0/conv1/conv_general_dilated"}, backend_config={"window_config":{"estimated_cycles":"7000"}}
  %norm = bf16[2,64,64,320]{3,2,1,0} fusion(%conv), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/resnets.0/norm1/mul"}, backend_config={"window_config":{"estimated_cycles":"300"}}
  %to_q = bf16[8,320]{1,0} fusion(%b), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/attn1/to_q/dot_general"}, backend_config={"window_config":{"estimated_cycles":"20"}}
  %copy = f32[8]{0} copy(%a), backend_config={"window_config":{"estimated_cycles":"4"}}
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def kernel(name, operands):
    shapes = ", ".join(f"bf16[{shape}]{{2,1,0}}" for shape in operands)
    return (
        f"  %splash_mha_{name}.1 = (bf16[1,1]) custom-call(%a), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,4]{2,1,0}, '
        f"{shapes}, f32[16,8,4096]{{2,1,0}}}}, frontend_attributes={{kernel_metadata={{"
    )


def test_cycles_by_kind_and_turn():
    cost = cost_of(PROGRAM, CHIPS["v5e"])
    assert cost.cycles == {
        "attention": 5 * 100 + 100,  # a loop of five turns, and one that is not known
        "convolution": 7000,
        "norm": 300,
        "linear": 20,
        "other": 4,
    }
    assert cost.unknown_loops == 1


def test_of_branches_the_longest_counts():
    choice = (
        "  %c = f32[8]{0} conditional(%i, %a, %a), branch_computations={%body, %longer}\n"
        "  %d = f32[8]{0} conditional(%p, %a, %a), true_computation=%longer, "
        "false_computation=%body\n"
    )
    longer = (
        "%longer (s: f32[8]) -> f32[8] {\n"
        '  ROOT %l = f32[8]{0} copy(%s), backend_config={"estimated_cycles":"5000"}\n}\n\n'
    )
    text = PROGRAM.replace("ENTRY", f"{longer}ENTRY").replace("  %copy =", f"{choice}  %copy =")
    cost = cost_of(text, CHIPS["v5e"])
    assert cost.branches == 2
    assert cost.cycles["other"] == 4 + 2 * 5000
    assert cost.cycles["attention"] == 600  # as without them


def test_kernels_that_are_not_ours_are_named():
    line = (
        '  %paged_attention.3 = (bf16[1,1]) custom-call(%a), custom_call_target="tpu_custom_call", '
        "operand_layout_constraints={bf16[8,128]{1,0}, s32[4]{0}}, "
        'metadata={op_name="jit(step)/paged_attention/pallas_call"}'
    )
    text = PROGRAM.replace("  %copy =", f"{line}\n  %copy =")
    cost = cost_of(text, CHIPS["v5e"])
    assert cost.unknown_kernels == {"paged_attention": 1}
    assert "attention kernels" not in cost.cycles


@pytest.mark.parametrize(
    ("name", "products"),
    [("fwd_residuals", 2), ("fwd_no_residuals", 2), ("dkv_no_residuals", 5)],
)
def test_kernels_by_their_formula(name, products):
    line = kernel(name, ["16,40,4096"] * 3)
    scores = 16 * 4096**2
    # Four units of 128 x 128, heads filled up to 128, 1024 exponentials a cycle.
    assert splash(line, CHIPS["v5e"]) == scores * (products * 128 / 65536 + 1 / 1024)
    text = PROGRAM.replace("  %copy =", f"{line}\n  %copy =")
    cost = cost_of(text, CHIPS["v5e"])
    assert cost.cycles["attention kernels"] == round(splash(line, CHIPS["v5e"]))
    assert not cost.unknown_kernels


def test_wide_heads_and_wide_units():
    line = kernel("fwd_residuals", ["1,160,1024", "1,160,2048", "1,160,2048"])
    # Two registers wide; of a v6e's four units of 256 x 256 half is in use.
    per_score = 2 * 256 / (4 * 256 * 128) + 1 / 1024
    assert splash(line, CHIPS["v6e"]) == 1024 * 2048 * per_score


def test_both_cores_of_a_chip_do_exponentials():
    line = kernel("fwd_residuals", ["2,128,1024"] * 3)
    per_score = 2 * 128 / (8 * 128 * 128) + 1 / 2048
    assert splash(line, CHIPS["v5p"]) == 2 * 1024**2 * per_score


def test_the_peak_is_that_of_the_units():
    for chip, units in (("v5e", 4), ("v5p", 8), ("v6e", 4)):
        assert CHIPS[chip].units == units
