"""patch(): which layers are built as fastrnn's while it is active, and which stay torch's."""

import copy
import functools
import inspect
import pickle
import threading

import pytest
import torch
from helpers import flat
from replace_cases import (
    NAMES,
    H,
    I,
    OwnForward,
    Plain,
    an_input,
    result,
)
from torch import nn
from torch.nn import LSTM as IMPORTED_EARLIER
from torch.testing import assert_close

import fastrnn

# Runs before any kernel, so one instruction set is enough.
pytestmark = [pytest.mark.once, pytest.mark.cpu("replacement does not depend on the device")]


@pytest.mark.parametrize("name", NAMES)
def test_patch_builds_ours(name):
    torch_class, our_class = getattr(nn, name), getattr(fastrnn, name)
    signature = inspect.signature(torch_class)
    with fastrnn.patch():
        assert inspect.signature(torch_class) == signature
        torch.manual_seed(0)
        module = getattr(torch.nn, name)(I, H)
        assert type(module) is our_class
        assert type(our_class(I, H)) is our_class
        assert getattr(nn.modules.rnn, name) is torch_class
    torch.manual_seed(0)
    theirs = torch_class(I, H)
    assert type(theirs) is torch_class
    assert_close(result(module), result(theirs))


def test_patch_reaches_names_imported_earlier_and_keeps_isinstance():
    before = nn.LSTM(I, H)
    with fastrnn.patch():
        module = IMPORTED_EARLIER(I, H)
        assert type(module) is fastrnn.LSTM
        assert isinstance(module, nn.LSTM)
        assert isinstance(before, nn.LSTM)
        assert type(before) is nn.LSTM
        assert nn.LSTM is IMPORTED_EARLIER


def test_patch_without_with_statement():
    patch = fastrnn.patch()
    try:
        assert type(nn.GRU(I, H)) is fastrnn.GRU
    finally:
        patch.undo()
    assert type(nn.GRU(I, H)) is nn.GRU
    patch.undo()
    assert type(nn.GRU(I, H)) is nn.GRU

    with patch as again:
        assert again is patch
        assert type(nn.GRU(I, H)) is fastrnn.GRU
    assert type(nn.GRU(I, H)) is nn.GRU


def test_patch_created_before_with_statement():
    patch = fastrnn.patch()
    with patch:
        assert type(nn.GRU(I, H)) is fastrnn.GRU
    assert type(nn.GRU(I, H)) is nn.GRU


def test_nested_patches():
    with fastrnn.patch():
        with fastrnn.patch():
            assert type(nn.GRU(I, H)) is fastrnn.GRU
        assert type(nn.GRU(I, H)) is fastrnn.GRU
    assert type(nn.GRU(I, H)) is nn.GRU

    first, second = fastrnn.patch(), fastrnn.patch()
    first.undo()
    first.undo()
    assert type(nn.GRU(I, H)) is fastrnn.GRU
    second.undo()
    assert type(nn.GRU(I, H)) is nn.GRU


def test_patch_ends_on_exception():
    with pytest.raises(ValueError, match="hidden_size"), fastrnn.patch():
        nn.GRU(I, 0)
    assert type(nn.GRU(I, H)) is nn.GRU


def test_patch_keeps_errors_and_warnings():
    def message():
        with pytest.raises(ValueError) as error:
            nn.LSTM(I, 0)
        return str(error.value)

    with pytest.warns(UserWarning, match="dropout option adds") as theirs:
        nn.LSTM(I, H, dropout=0.5)
    expected = message()
    with fastrnn.patch():
        with pytest.warns(UserWarning, match="dropout option adds") as ours:
            nn.LSTM(I, H, dropout=0.5)
        assert message() == expected
    assert (ours[0].filename, ours[0].lineno) == (theirs[0].filename, theirs[0].lineno)


def test_patch_and_subclasses(reports):
    class Alone(OwnForward):
        pass

    with fastrnn.patch():

        class Inside(nn.LSTM):
            def __init__(self):
                super().__init__(I, H, batch_first=True)
                self.head = nn.GRU(I, H)

        inside, plain, own, _ = Inside(), Plain(I), Alone(I, H), Alone(I, H)
    assert isinstance(inside, Inside)
    assert isinstance(inside, fastrnn.LSTM)
    assert inside.batch_first
    assert type(inside.head) is fastrnn.GRU
    assert isinstance(plain, Plain)
    assert isinstance(plain, fastrnn.LSTM)
    assert plain.scale == 1
    assert type(own) is Alone
    why = "it overrides forward and does not call super().forward"
    assert reports() == [f"{Alone.__qualname__} is left alone: {why}"]
    assert type(fastrnn.restore(inside)) is Inside


@pytest.mark.parametrize("name", NAMES)
def test_pickles_across_a_patch(name):
    before = getattr(nn, name)(I, H)
    expected = result(before)
    data = pickle.dumps(before)
    with fastrnn.patch():
        # Pickling and copying torch's own layer is not affected by the patch.
        assert pickle.dumps(before) == data
        for twin in (pickle.loads(data), copy.deepcopy(before)):
            assert type(twin) is type(before)
            assert_close(result(twin), expected)
            assert type(fastrnn.accelerate(twin)) is getattr(fastrnn, name)
        ours = pickle.dumps(getattr(nn, name)(I, H))
    assert type(pickle.loads(ours)) is getattr(fastrnn, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_under_a_patch():
    with fastrnn.patch():
        model = nn.Sequential(nn.LSTM(I, H))
        expected = flat(model(an_input(model)))
        assert_close(flat(torch.jit.script(model)(an_input(model))), expected)


def test_patch_wrapped_by_other_code():
    patch = fastrnn.patch()
    ours = nn.GRU.__init__
    built = []

    @functools.wraps(ours)
    def theirs(self, *args, **kwargs):
        built.append(args)
        ours(self, *args, **kwargs)

    nn.GRU.__init__ = theirs
    try:
        patch.undo()
        assert nn.GRU.__init__ is theirs
        assert type(nn.GRU(I, H)) is nn.GRU
        with fastrnn.patch():
            assert type(nn.GRU(I, H)) is fastrnn.GRU
        assert built == [(I, H)] * 2
    finally:
        nn.GRU.__init__ = inspect.unwrap(ours)


def test_patch_is_thread_safe():
    found = []

    def work():
        for _ in range(20):
            with fastrnn.patch():
                found.append(type(nn.RNNCell(1, 1)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [fastrnn.RNNCell] * 80
    assert type(nn.RNNCell(1, 1)) is nn.RNNCell
