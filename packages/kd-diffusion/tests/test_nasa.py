"""NASA: the equation by hand, then as a processor of whole networks and of stock pipelines."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_diffusion.integrations.nasa import Nasa, NasaAttnProcessor, nasa, steer
from kd_diffusion.integrations.nasa_joint import JointNasa, JointNasaProcessor, TextTokens
from kd_diffusion.integrations.nasa_pipeline import nasa_call
from kd_diffusion.testing_text import (
    PIPELINES,
    WIDTH,
    pixart_pipeline,
    sd3_network,
    sdxl_pipeline,
    tiny_pixart,
    tiny_unet,
    word_tokenizer,
)
from kdcore.errors import InputError


def text(batch=1, length=5, width=WIDTH, seed=1):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- one layer


def hand_layer(bias=(0.0, 0.0), out=((1.0, 0.0), (0.0, 1.0)), **kwargs):
    """Two channels, one head; the text's first half is the key, its second half the value."""
    from diffusers.models.attention_processor import Attention

    layer = Attention(query_dim=2, cross_attention_dim=4, heads=1, dim_head=2, **kwargs).double()
    weights = {
        "to_q.weight": torch.eye(2),
        "to_k.weight": torch.eye(4)[:2],
        "to_v.weight": torch.eye(4)[2:],
        "to_out.0.weight": torch.tensor(out),
        "to_out.0.bias": torch.tensor(bias),
    }
    layer.load_state_dict(weights)
    return layer.requires_grad_(False)


HAND_Q = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
HAND_POSITIVE = torch.tensor([[[1.0, 0.0, 1.0, 2.0], [0.0, 1.0, 3.0, 4.0]]], dtype=torch.float64)
HAND_NEGATIVE = torch.tensor([[[0.0, 1.0, 2.0, 0.0], [2.0, 0.0, 0.0, 6.0]]], dtype=torch.float64)
Z_POSITIVE = torch.tensor([1.6604769013466862, 2.6604769013466862], dtype=torch.float64)
Z_NEGATIVE = torch.tensor([0.3911406, 4.8265781], dtype=torch.float64)


def test_hand_value():
    layer = hand_layer()
    torch.testing.assert_close(layer(HAND_Q, HAND_POSITIVE)[0, 0], Z_POSITIVE)
    layer.set_processor(NasaAttnProcessor(0.2, HAND_NEGATIVE))
    expected = torch.tensor([1.5822488, 1.6951613], dtype=torch.float64)
    torch.testing.assert_close(layer(HAND_Q, HAND_POSITIVE)[0, 0], expected, atol=1e-7, rtol=0)


def test_the_subtraction_is_before_the_output_projection():
    """Its bias, the residual and the rescaling are there once."""
    out, bias = ((2.0, -1.0), (0.5, 3.0)), (10.0, -7.0)
    layer = hand_layer(bias, out, residual_connection=True, rescale_output_factor=2.0)
    layer.set_processor(NasaAttnProcessor(0.2, HAND_NEGATIVE))
    projected = torch.tensor(out, dtype=torch.float64) @ (Z_POSITIVE - 0.2 * Z_NEGATIVE)
    expected = (projected + torch.tensor(bias, dtype=torch.float64) + HAND_Q[0, 0]) / 2
    torch.testing.assert_close(layer(HAND_Q, HAND_POSITIVE)[0, 0], expected, atol=1e-6, rtol=0)


def random_layer(seed=0, **kwargs):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(seed)
    return Attention(query_dim=8, cross_attention_dim=WIDTH, heads=2, dim_head=4, **kwargs).double()


def steered(layer, image, positive, alpha, negative, mask=None, processor=None, **kwargs):
    original = layer.processor
    layer.processor = NasaAttnProcessor.around(processor or original, alpha, negative, mask)
    try:
        return layer(image, positive, **kwargs)
    finally:
        layer.processor = original


@given(st.floats(0, 5), st.integers(1, 3), st.integers(1, 4))
def test_output_is_affine_in_alpha(alpha, batch, length):
    layer, image = random_layer(), torch.randn(batch, 6, 8, dtype=torch.float64)
    positive, negative = text(batch), text(1, length, seed=2)
    zero, one, out = (steered(layer, image, positive, a, negative) for a in (0.0, 1.0, alpha))
    torch.testing.assert_close(out, (1 - alpha) * zero + alpha * one)


def test_a_text_against_itself_shrinks_the_output():
    """c_n = c_p: Z_nasa = (1 - alpha) Z+."""
    layer, image, positive = random_layer(out_bias=False), torch.randn(3, 6, 8, dtype=torch.float64), text(3)
    out = steered(layer, image, positive, 0.3, positive)
    torch.testing.assert_close(out, 0.7 * layer(image, positive))


@pytest.mark.parametrize("name", ["AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "FusedAttnProcessor2_0"])
def test_inside_any_processor(name):
    """The same output, with qk norms and a norm of the text, masks on both texts, and (B, C, H, W) input."""
    from diffusers.models import attention_processor

    norms = {} if name in ("AttnProcessor", "SlicedAttnProcessor") else {"qk_norm": "layer_norm"}
    layer = random_layer(cross_attention_norm="layer_norm", norm_num_groups=2, residual_connection=True, **norms)
    image, positive, negative = torch.randn(2, 8, 2, 3, dtype=torch.float64), text(2), text(2, 4, seed=2)
    bias = torch.tensor([[0, 0, 0, -10000.0, 0]] * 2, dtype=torch.float64)[:, None]
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]])
    kwargs = {"attention_mask": bias}
    expected = steered(layer, image, positive, 0.4, negative, mask, **kwargs)
    processor = getattr(attention_processor, name)(*([1] if name == "SlicedAttnProcessor" else []))
    if name == "FusedAttnProcessor2_0":
        layer.fuse_projections()
        layer.processor = processor
    out = steered(layer, image, positive, 0.4, negative, mask, processor, **kwargs)
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, layer(image, positive, **kwargs), atol=1e-3)


def test_order_and_padding_of_the_negative_have_no_influence():
    layer, image, positive, negative = random_layer(), torch.randn(2, 6, 8, dtype=torch.float64), text(2), text(2, 4)
    out = steered(layer, image, positive, 0.5, negative)
    torch.testing.assert_close(steered(layer, image, positive, 0.5, negative[:, [2, 0, 3, 1]]), out)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    padded = [torch.cat([negative, filler], 1) for filler in (text(2, 2, seed=8), 100 * text(2, 2, seed=9))]
    first, second = (steered(layer, image, positive, 0.5, x, mask) for x in padded)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, out)
    assert not torch.allclose(steered(layer, image, positive, 0.5, padded[0]), out, atol=1e-3)


def test_batches():
    """A shared negative, one per sample, one per half of a guidance-doubled batch; alpha alike."""
    layer, image, positive = random_layer(), torch.randn(4, 6, 8, dtype=torch.float64), text(4)
    negative, alpha = text(2, seed=3), torch.tensor([0.1, 0.9])
    shared = steered(layer, image, positive, 0.5, negative[:1])
    assert torch.equal(shared, steered(layer, image, positive, 0.5, negative[:1].expand(4, -1, -1)))
    doubled = steered(layer, image, positive, alpha, negative)
    for i in range(4):
        one = steered(layer, image[i : i + 1], positive[i : i + 1], alpha[i % 2].item(), negative[i % 2 : i % 2 + 1])
        torch.testing.assert_close(doubled[i : i + 1], one, atol=1e-7, rtol=1e-6)  # alpha is float32
    with pytest.raises(InputError, match="negative: a batch of 3 for a network batch of 4"):
        steered(layer, image, positive, 0.5, text(3))
    with pytest.raises(InputError, match="alpha: a batch of 3"):
        steered(layer, image, positive, torch.rand(3), negative)


def test_gradients():
    layer, image, positive = random_layer(), torch.randn(2, 3, 8, dtype=torch.float64), text(2)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    negative = text(2, 4, seed=5).requires_grad_()
    weights = [layer.to_q.weight, layer.to_k.weight, layer.to_v.weight, layer.to_out[0].weight]
    assert torch.autograd.gradcheck(
        lambda a, c, *_: steered(layer, image, positive, a, c), (alpha, negative, *weights), fast_mode=True
    )


def test_half_precision():
    """The layer's dtype is kept, whatever that of alpha and of the negative text, and the value to its precision."""
    image, positive, negative = torch.randn(2, 6, 8, dtype=torch.float64), text(2), text(2, seed=2)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
        for alpha in (0.5, torch.tensor(0.5), torch.tensor([0.5, 0.1])):
            out = steered(random_layer().to(dtype), image.to(dtype), positive.to(dtype), alpha, negative, mask)
            exact = steered(random_layer(), image, positive, alpha, negative, mask)
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        out = steered(random_layer().float(), image.float(), text(2).float(), torch.tensor([0.5]), text(1).float())
    assert out.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiles_to_one_graph_and_a_tensor_alpha_does_not_recompile():
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, image, positive = random_layer(), torch.randn(2, 6, 8, dtype=torch.float64), text(2)
    layer.processor = NasaAttnProcessor(torch.tensor(0.2), text(1, seed=2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for alpha in (0.2, 0.7):
        layer.processor.alpha = torch.tensor(alpha)
        torch.testing.assert_close(compiled(image, positive), layer(image, positive))
    assert counter.frame_count == 1


def test_a_processor_that_does_not_project_is_refused():
    with pytest.raises(InputError, match="calls the layer's to_q and to_out"):
        steered(random_layer(), text(1, 3, 8), text(), 0.5, text(), processor=lambda attn, x, **_: x)


# ---------------------------------------------------------------- networks


class Example:
    """A network with an input: `example()` is its output."""

    def __init__(self, kind, batch=2):
        x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        positive, t = text(batch, 5), torch.full((batch,), 7)
        if kind == "pixart":
            self.network, self.mask = tiny_pixart().double(), torch.tensor([[1, 1, 1, 0]])
            mask = torch.tensor([[1, 1, 1, 1, 0]] * batch)
            self.kwargs = {"timestep": t, "encoder_hidden_states": positive, "encoder_attention_mask": mask}
        else:
            self.network, self.mask = tiny_unet(sdxl=kind == "sdxl").double(), None
            self.kwargs = {"timestep": t, "encoder_hidden_states": positive}
            if kind == "sdxl":
                pooled, times = torch.randn(batch, 16, dtype=torch.float64), torch.ones(batch, 6, dtype=torch.float64)
                self.kwargs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": times}
        self.x, self.negative = x, text(1, 4, seed=2)

    def __call__(self):
        return self.network(self.x, **self.kwargs).sample

    def steered(self, alpha, negative=None, mask=None):
        return nasa(self.network, self.negative if negative is None else negative, alpha, mask or self.mask)


KINDS = ["unet", "sdxl", "pixart"]


@pytest.fixture(params=KINDS)
def example(request):
    return Example(request.param)


def test_alpha_zero_is_the_untouched_network(example):
    plain = example()
    for alpha in (0.0, 0, torch.tensor(0.0), torch.zeros(2)):
        with example.steered(alpha):
            assert torch.equal(example(), plain)
    with example.steered(0.5):
        assert not torch.allclose(example(), plain, atol=1e-3)


class EquationProcessor:
    """The equation written out: softmax attention to each text, subtracted, projected."""

    def __init__(self, alpha, negative, mask=None):
        self.alpha, self.negative, self.mask = alpha, negative, mask

    def attend(self, attn, image, context, bias):
        def heads(x):
            return x.reshape(x.shape[0], x.shape[1], attn.heads, -1).permute(0, 2, 1, 3)

        q, k, v = heads(attn.to_q(image)), heads(attn.to_k(context)), heads(attn.to_v(context))
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        logits = logits if bias is None else logits + bias
        return (logits.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(*image.shape[:2], -1)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        bias = None if attention_mask is None else attention_mask[:, None]
        negative = self.negative.expand(len(hidden_states), -1, -1)
        negative_bias = None if self.mask is None else (1 - self.mask[:, None, None, :].double()) * -1e9
        z = self.attend(attn, hidden_states, encoder_hidden_states, bias)
        z = z - self.alpha * self.attend(attn, hidden_states, negative, negative_bias)
        return attn.to_out[0](z)


def test_networks_against_the_equation(example):
    with example.steered(0.4):
        out = example()
    negative = example.negative
    if hasattr(example.network, "caption_projection"):
        negative = example.network.caption_projection(negative)
    layers = [module for name, module in example.network.named_modules() if name.endswith("attn2")]
    assert len(layers) == len(Nasa.find_layers(example.network)) > 1
    for layer in layers:
        layer.processor = EquationProcessor(0.4, negative, example.mask)
    torch.testing.assert_close(out, example())


def test_restored_with_the_same_state_dict(example):
    plain, keys, processors = example(), list(example.network.state_dict()), example.network.attn_processors
    with example.steered(0.5) as inside:
        assert list(example.network.state_dict()) == keys
        wrapped = [name for name, p in example.network.attn_processors.items() if isinstance(p, NasaAttnProcessor)]
        assert all(".attn2." in name for name in wrapped)
        assert len(wrapped) == len(inside.processors)
        with pytest.raises(InputError, match="already installed"):
            inside.install()
    assert example.network.attn_processors == processors
    assert torch.equal(example(), plain)
    with pytest.raises(ZeroDivisionError), example.steered(0.5):
        1 / 0  # noqa: B018
    assert example.network.attn_processors == processors


def test_set_alpha_and_negative_between_forwards(example):
    def fresh(alpha, negative):
        with example.steered(alpha, negative):
            return example()

    other = text(2, 4, seed=7)
    expected = [fresh(0.2, example.negative), fresh(torch.tensor(0.9), example.negative), fresh(0.9, other)]
    with example.steered(0.2) as inside:
        outputs = [example()]
        inside.set_alpha(torch.tensor(0.9))
        outputs.append(example())
        inside.set_alpha(0.9)
        inside.set_negative(other, example.mask)
        outputs.append(example())
    for out, wanted in zip(outputs, expected):
        assert torch.equal(out, wanted)


def test_two_negatives(example):
    """Nested blocks subtract both: the same negative twice is twice the scale."""
    with example.steered(0.5):
        expected = example()
    with example.steered(0.2), example.steered(0.3):
        torch.testing.assert_close(example(), expected)


def test_gradients_reach_the_network_through_the_negative(example):
    """With the image's and the positive text's share held fixed, to_v (and PixArt's text projection) still learn."""
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with example.steered(alpha) as inside:
        loss = example().square().mean()
        slope = torch.autograd.grad(loss, alpha, retain_graph=True)[0]
        loss.backward()
        with torch.no_grad():
            inside.set_alpha(alpha + 1e-6)
            up = example().square().mean()
            inside.set_alpha(alpha - 1e-6)
            down = example().square().mean()
    torch.testing.assert_close(slope, (up - down) / 2e-6, rtol=1e-5, atol=1e-9)
    weight = inside.layers[0].to_v.weight
    with example.steered(0.0):
        plain = torch.autograd.grad(example().square().mean(), weight)[0]
    assert not torch.allclose(weight.grad, plain, atol=1e-6)


@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_gradient_checkpointing(kind):
    example = Example(kind)
    weight = example.network.get_parameter(
        next(name for name, _ in example.network.named_parameters() if name.endswith("attn2.to_k.weight"))
    )
    gradients = []
    for checkpointing in (False, True):
        example.network.train().requires_grad_()
        if checkpointing:
            example.network.enable_gradient_checkpointing()
        with example.steered(torch.tensor(0.4)):
            gradients.append(torch.autograd.grad(example().square().mean(), weight)[0])
    torch.testing.assert_close(*gradients)


def test_adapters_with_weights_keep_their_place():
    """IP-Adapter: its image attention stays in Z+, its weights in the state dict."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    layer = random_layer()
    layer.set_processor(IPAdapterAttnProcessor2_0(hidden_size=8, cross_attention_dim=WIDTH, num_tokens=(3,)).double())
    pair, image = (text(2), [text(2, 3, seed=4)]), torch.randn(2, 6, 8, dtype=torch.float64)
    keys, adapter, plain = list(layer.state_dict()), layer.processor, layer(image, pair)
    network = nn.ModuleDict({"layer": layer})
    with nasa(network, text(1, 4, seed=2), 0.5):
        assert list(layer.state_dict()) == keys
        out = layer(image, pair)
    assert layer.processor is adapter
    assert list(layer.state_dict()) == keys
    without = random_layer()
    difference = steered(without, image, pair[0], 0.5, text(1, 4, seed=2)) - without(image, pair[0])
    torch.testing.assert_close(out - plain, difference)


def test_lora_of_the_projections_counts_for_the_negative():
    """A student with LoRA layers, as in training: NASA uses their current weights, and they get its gradient."""
    from peft import LoraConfig

    example = Example("unet")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    example.network.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    for parameter in example.network.parameters():
        parameter.data = parameter.data.double()
    with example.steered(0.4) as inside:
        out = example()
        layer = inside.layers[0]
        out.square().mean().backward()
    assert layer.to_k.lora_A["default"].weight.grad.abs().max() > 0
    for layer in inside.layers:
        layer.processor = EquationProcessor(0.4, example.negative)
    torch.testing.assert_close(out, example())


def test_text_projection_of_a_unet():
    network = tiny_unet(encoder_hid_dim=6, encoder_hid_dim_type="text_proj").double()
    x, t, positive = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor(3), text(1, 5, 6)
    with nasa(network, positive, 0.5):
        out = network(x, t, positive).sample
    for layer in Nasa.find_layers(network):
        layer.processor = EquationProcessor(0.5, network.encoder_hid_proj(positive))
    torch.testing.assert_close(out, network(x, t, positive).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -0.1}, "alpha = -0.1"),
        ({"alpha": float("nan")}, "alpha = nan"),
        ({"alpha": "0.1"}, "alpha = '0.1'"),
        ({"alpha": torch.ones(1, 1)}, "alpha: torch.float32 of shape"),
        ({"negative": torch.ones(5, WIDTH)}, r"negative: \(5, 12\)"),
        ({"negative": text(1, 5, 7)}, "negative: width 7; allowed: 12"),
        ({"mask": torch.ones(1, 4)}, r"mask: shape \(1, 4\)"),
        ({"mask": torch.tensor([[0, 0, 0, 0, 0]])}, "mask: a row without a token"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"negative": text(), "alpha": 0.1, "mask": None} | changes
    for network in (tiny_unet(), tiny_pixart()):
        with pytest.raises(InputError, match=message):
            nasa(network, arguments["negative"], arguments["alpha"], arguments["mask"])


def test_networks_without_text_are_refused():
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    with pytest.raises(InputError, match="UNet2DModel: has no text attention"):
        nasa(network, text(), 0.1)
    with pytest.raises(InputError, match="a pipeline with a unet or transformer"):
        nasa("a folder", text(), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_networks(kind):
    example = Example(kind)
    with torch.no_grad(), example.steered(torch.tensor(0.4)):
        expected = example()
        compiled = torch.compile(example.network, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(example.x, **example.kwargs).sample, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(example.x, **example.kwargs).sample, example())
        with nasa(compiled, example.negative, torch.tensor(0.4), example.mask):
            torch.testing.assert_close(compiled(example.x, **example.kwargs).sample, expected)


# ---------------------------------------------------------------- joint attention


def tiny_sd3(pooled=6):
    network = sd3_network(pooled)
    kwargs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500.0, 20.0])}
    return network, kwargs | {"encoder_hidden_states": text(2).float(), "pooled_projections": torch.randn(2, pooled)}


def tiny_flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
    )
    kwargs = {"hidden_states": torch.randn(2, 16, 4), "timestep": torch.tensor([0.5, 0.02])}
    kwargs |= {"encoder_hidden_states": text(2).float(), "pooled_projections": torch.randn(2, 6)}
    grid = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
    return network, kwargs | {"txt_ids": torch.zeros(5, 3), "img_ids": grid.reshape(16, 3)}


@pytest.fixture(params=[tiny_sd3, tiny_flux])
def joint(request):
    network, kwargs = request.param()
    kwargs = {name: x.double() for name, x in kwargs.items()}
    return network.double().eval().requires_grad_(False), kwargs


def test_joint_attention(joint):
    network, kwargs = joint
    plain, keys, processors = network(**kwargs).sample, list(network.state_dict()), network.attn_processors
    negative = text(1, 3, seed=2)
    with nasa(network, negative, 0.0) as inside:
        assert isinstance(inside, JointNasa)
        assert list(network.state_dict()) == keys
        assert torch.equal(network(**kwargs).sample, plain)
        inside.set_alpha(torch.tensor(0.0))  # the negative runs along, and nothing attends to it
        torch.testing.assert_close(network(**kwargs).sample, plain)
        inside.set_alpha(0.5)
        out = network(**kwargs).sample
        inside.set_negative(negative[:, [2, 0, 1]])  # its tokens have no position
        torch.testing.assert_close(network(**kwargs).sample, out)
    assert not torch.allclose(out, plain, atol=1e-4)
    assert network.attn_processors == processors
    assert torch.equal(network(**kwargs).sample, plain)


def test_joint_bad_input(joint):
    network, _ = joint
    with pytest.raises(InputError, match="negative: width 7; allowed: 12"):
        nasa(network, text(1, 5, 7), 0.1)
    with pytest.raises(InputError, match="mask: allowed with joint attention: None"):
        nasa(network, text(), 0.1, torch.ones(1, 5))
    with nasa(network, text(), 0.1), pytest.raises(InputError, match="processor = JointNasaProcessor"):
        nasa(network, text(), 0.1).install()


def test_joint_layer_against_the_equation():
    """Image tokens of a layer: joint attention to image and positive text, minus alpha times the negative alone."""
    network = tiny_sd3()[0].double()
    layer = network.transformer_blocks[0].attn
    image, positive, negative = (text(2, n, 16, seed=n) for n in (6, 5, 3))
    plain, plain_text = layer(image, encoder_hidden_states=positive)
    layer.processor = JointNasaProcessor(layer.processor, 0.4, TextTokens(5, 3))
    out, out_text = layer(image, encoder_hidden_states=torch.cat([positive, negative], 1))

    def heads(x, norm=None):
        x = x.reshape(2, -1, 2, 8).transpose(1, 2)
        return x if norm is None else norm(x)

    q, k = heads(layer.to_q(image), layer.norm_q), heads(layer.add_k_proj(negative), layer.norm_added_k)
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    z = (weights @ heads(layer.add_v_proj(negative))).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, plain - 0.4 * z @ layer.to_out[0].weight.T)
    torch.testing.assert_close(out_text[:, :5], plain_text)


# ---------------------------------------------------------------- stock pipelines


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    assert len(tokenizer("three cat").input_ids) == 4  # the words are tokens of their own
    return tokenizer


@pytest.fixture(scope="module", params=list(PIPELINES))
def pipe(request, tokenizer):
    pipeline = PIPELINES[request.param](tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings(pipe):
    options = {"num_inference_steps": 1, "height": 8, "width": 8, "output_type": "latent"}
    if type(pipe).__name__ == "PixArtAlphaPipeline":
        options |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8}
    if type(pipe).__name__ == "FluxPipeline":
        options["max_sequence_length"] = 8
    return options


def sample(pipe, *args, count=1, **kwargs):
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    return nasa_call(pipe, *args, generator=generators, **settings(pipe), **kwargs).images


def test_pipelines_without_a_negative_are_the_stock_ones(pipe):
    guidance = {} if type(pipe).__name__ == "FluxPipeline" else {"guidance_scale": 0.0}
    stock = pipe("digit three", generator=[torch.Generator().manual_seed(0)], **guidance, **settings(pipe)).images
    assert torch.equal(sample(pipe, "digit three"), stock)
    assert torch.equal(sample(pipe, "digit three", None, 0.7), stock)
    assert torch.equal(sample(pipe, "digit three", "thin", 0.0), stock)
    assert not torch.allclose(sample(pipe, "digit three", "", 0.5), stock, atol=1e-5)  # the empty text is a text
    assert torch.equal(sample(pipe, "digit three"), stock)  # restored


def test_pipelines_with_negatives(pipe):
    """The right prompt's negative reaches each image: batches agree with single calls."""
    negatives = ["thin", "bold cat"]
    batch = sample(pipe, ["three", "seven"], negatives, 0.5, count=4, num_images_per_prompt=2)
    shared = sample(pipe, ["three", "seven"], "bold cat", 0.5, count=2)
    assert not torch.allclose(batch[0], sample(pipe, "three", "bold cat", 0.5)[0], atol=1e-5)
    for i, prompt in enumerate(["three", "seven"]):
        for j in range(2):
            generator = torch.Generator().manual_seed(2 * i + j)
            one = nasa_call(pipe, prompt, negatives[i], 0.5, generator=generator, **settings(pipe)).images
            torch.testing.assert_close(batch[2 * i + j], one[0], atol=1e-4, rtol=1e-4)
        generator = torch.Generator().manual_seed(i)
        one = nasa_call(pipe, prompt, "bold cat", 0.5, generator=generator, **settings(pipe)).images
        torch.testing.assert_close(shared[i], one[0], atol=1e-4, rtol=1e-4)


def test_pipelines_refuse(pipe):
    with pytest.raises(InputError, match="allowed: None, a string, or 2 strings"):
        sample(pipe, ["cat", "dog"], ["a", "b", "c"], count=2)
    with pytest.raises(InputError, match="for embeddings `with nasa"):
        sample(pipe, "cat", negative_prompt_embeds=text())
    if type(pipe).__name__ != "FluxPipeline":
        with pytest.raises(InputError, match=r"guidance_scale = 7\.5: NASA stands in for guidance"):
            sample(pipe, "cat", "dog", guidance_scale=7.5)


def test_the_pooled_embedding_stays_positive(tokenizer):
    pipe = sdxl_pipeline(tokenizer)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["added_cond_kwargs"]["text_embeds"], args[0].shape)),
        with_kwargs=True,
    )
    sample(pipe, "digit three")
    sample(pipe, "digit three", "thin", 0.5)
    hook.remove()
    (plain, _), (steered_pooled, shape) = seen
    assert torch.equal(plain, steered_pooled)
    assert len(shape) == 4
    assert shape[0] == 1  # the batch is not doubled
    two = sample(pipe, "digit three", "thin", 0.5, negative_prompt_2="bold")
    assert not torch.allclose(two, sample(pipe, "digit three", "thin", 0.5), atol=1e-5)


def test_padding_of_a_masked_negative_has_no_influence(tokenizer):
    """PixArt: the length to which the negative prompt is padded does not matter."""
    pipe = pixart_pipeline(tokenizer)
    pipe.set_progress_bar_config(disable=True)
    options = settings(pipe) | {"max_sequence_length": 16}
    long = nasa_call(pipe, "cat", "dog", 0.5, generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(long, sample(pipe, "cat", "dog", 0.5), atol=1e-4, rtol=1e-4)


@given(st.floats(0, 2), st.integers(1, 3))
def test_steer_is_the_equation(alpha, batch):
    z, z_negative = text(batch), text(batch, seed=2)
    alphas = torch.full((batch,), alpha, dtype=torch.float64)
    torch.testing.assert_close(steer(z, z_negative, alphas), steer(z, z_negative, alpha))
    torch.testing.assert_close(steer(z, z, alpha), (1 - alpha) * z)
