"""The rows of docs/migrate/onnx.md, each beside the reference evaluator of onnx, and inference beside onnxruntime."""

import batchnorm
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: tests/frameworks.sh installs it")
reference = pytest.importorskip("onnx.reference")
helper = onnx.helper


def model(x, parameters, opset, outputs, **attributes):
    """A model of the one operator, with the types of its arguments."""
    def value(name, array):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    names = ["scale", "B", "input_mean", "input_var"]
    node = helper.make_node("BatchNormalization", ["X", *names], outputs, **attributes)
    results = [value("Y", x), *(value(name, parameters[-1]) for name in outputs[1:])]
    graph = helper.make_graph([node], "one", [value("X", x), *map(value, names, parameters)], results)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def run(x, parameters, opset=15, training=False, **attributes):
    outputs = ["Y"]
    if training:
        attributes["training_mode"] = 1
        outputs += ["running_mean", "running_var"]
    evaluator = reference.ReferenceEvaluator(model(x, parameters, opset, outputs, **attributes))
    return evaluator.run(None, dict(zip(["X", "scale", "B", "input_mean", "input_var"], [x, *parameters])))


def parameters(case):
    return [case.gamma, case.beta, case.mean, case.var]


def test_page(page):
    page("onnx").run()
    assert page("onnx").lists("rust") == page("onnx").lists("python")


def test_defaults():
    attributes = onnx.defs.get_schema("BatchNormalization", 15).attributes
    defaults = {name: helper.get_attribute_value(value.default_value) for name, value in attributes.items()}
    assert {name: round(value, 6) for name, value in defaults.items()} == {"epsilon": 1e-5, "momentum": 0.9, "training_mode": 0}


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 4, 5, 6)])
def test_inference_and_layout(case, same, shape):
    c = case(shape)
    [y] = run(c.x, parameters(c), epsilon=1e-2)
    same(batchnorm.forward_infer(c.x, c.mean, c.var, c.gamma, c.beta, eps=np.float32(1e-2)), y)


@pytest.mark.parametrize("momentum", [0.9, 0.25])
def test_training(case, same, momentum):
    c = case()
    y, mean, var = run(c.x, parameters(c), training=True, momentum=momentum)
    # Attributes are float32.
    momentum, eps = np.float32([momentum, 1e-5]).tolist()
    got, saved = batchnorm.forward_train(c.x, c.gamma, c.beta, eps=eps)
    batchnorm.update_running(c.mean, c.var, saved, weight_of_old=momentum, unbiased=False)
    same(got, y)
    same(c.mean, mean)
    same(c.var, var)


def test_mixed_precision(case, same):
    c = case()
    x = c.x.astype(np.float16)
    [y] = run(x, [values.astype(np.float32) for values in parameters(c)])
    assert y.dtype == np.float16
    # An ulp: both round once, from values that differ in the last bits of float32.
    same(batchnorm.forward_infer(x, c.mean, c.var, c.gamma, c.beta), y, 2.0**-10)


def test_opset_9(case, same):
    c = case()
    schema = onnx.defs.get_schema("BatchNormalization", 9)
    assert "training_mode" not in schema.attributes and "spatial" not in schema.attributes
    assert [output.name for output in schema.outputs] == ["Y", "mean", "var", "saved_mean", "saved_var"]
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: tests/frameworks.sh installs it")
    c = case((4, 3, 5, 6))
    inputs = [values.astype(np.float32) for values in [c.x, *parameters(c)]]
    session = runtime.InferenceSession(model(inputs[0], inputs[1:], 9, ["Y"]).SerializeToString())
    [y] = session.run(None, dict(zip(["X", "scale", "B", "input_mean", "input_var"], inputs)))
    x, gamma, beta, mean, var = inputs
    same(batchnorm.forward_infer(x, mean, var, gamma, beta), y, 2e-6)


def test_onnxruntime(case, same):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: tests/frameworks.sh installs it")
    c = case((4, 3, 5, 6))
    inputs = [values.astype(np.float32) for values in [c.x, *parameters(c)]]
    session = runtime.InferenceSession(model(inputs[0], inputs[1:], 15, ["Y"]).SerializeToString())
    [y] = session.run(None, dict(zip(["X", "scale", "B", "input_mean", "input_var"], inputs)))
    x, gamma, beta, mean, var = inputs
    same(batchnorm.forward_infer(x, mean, var, gamma, beta), y, 2e-6)


def test_one_value(case, same):
    c = case((1, 3))
    y, _, var = run(c.x, parameters(c), training=True, momentum=0.5)
    same(y, [c.beta])
    got, saved = batchnorm.forward_train(c.x, c.gamma, c.beta)
    batchnorm.update_running(c.mean, c.var, saved, weight_of_old=0.5, unbiased=False)
    same(got, [c.beta])
    same(c.var, var)
