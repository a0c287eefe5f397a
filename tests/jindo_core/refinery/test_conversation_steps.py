"""FastChat's rules for conversations: what is repaired, what goes, and that a split loses no round."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jindo_core.data.formats import conversation, conversation_turns
from jindo_core.data.readers import Row
from jindo_core.data.records import Record, Round
from jindo_core.refinery.conversation_steps import (
    STEPS,
    ConversationLength,
    ConversationRoles,
    SeparateRounds,
    SplitConversations,
)
from jindo_core.refinery.pipeline import Flagged, Item, Rejected


def turns(said):
    """ "hga" -> turns of human, gpt and system, each with its letter and place as text."""
    who = {"h": "human", "g": "gpt", "s": "system"}
    return [{"from": who[letter], "value": f"{letter}{place}"} for place, letter in enumerate(said)]


def roles(said, **options):
    return ConversationRoles(**options)({"id": "x", "conversations": turns(said)})


def item(*lengths, system=""):
    rounds = tuple(Round("q" * (length // 2), "", "a" * (length - length // 2)) for length in lengths)
    return Item(Record(rounds, system, row=3), {"id": "x"}, 3)


# --- roles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["hg", "shg", "hghg", "shghghg"])
def test_alternating_conversations_stay(said):
    values = {"conversations": turns(said)}
    assert ConversationRoles()(values) is values


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("ghg", ["h1", "g2"]),  # an answer to nothing
        ("gghg", ["h2", "g3"]),
        ("hgh", ["h0", "g1"]),  # a question that nobody answers
        ("sghgh", ["s0", "h2", "g3"]),
        ("hhg", ["h0\n\nh1", "g2"]),
        ("hgg", ["h0", "g1\n\ng2"]),
        ("hghhh", ["h0", "g1"]),  # joined, and then nobody answers
    ],
)
def test_broken_conversations_are_repaired(said, expected):
    result = roles(said)
    assert [turn["value"] for turn in result["conversations"]] == expected
    assert result["id"] == "x"
    assert ConversationRoles()(result) is result
    row = Row(1, "row 1", result)
    assert conversation(row, conversation_turns(row)).rounds  # what the format reads


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("h", "no question with an answer is left"),
        ("g", "no question with an answer is left"),
        ("s", "no question with an answer is left"),
        ("", "no question with an answer is left"),
        ("hgshg", "turn 3 is the system's, expected it first"),
        ("sshg", "turn 2 is the system's, expected it first"),
    ],
)
def test_what_cannot_be_repaired_goes(said, reason):
    assert roles(said) == Rejected(reason)


def test_joining_is_a_choice():
    assert roles("hhg", broken="reject") == Rejected("turn 2 is the user's, as the one before it")
    assert roles("hgghg", broken="reject") == Rejected("turn 3 is the assistant's, as the one before it")
    assert [turn["value"] for turn in roles("hhg", separator=" / ")["conversations"]] == ["h0 / h1", "g2"]


def test_turns_of_other_shapes():
    step = ConversationRoles()
    unrelated = {"instruction": "a", "output": "b"}
    assert step(unrelated) is unrelated
    messages = {"messages": [{"role": role, "content": role} for role in ("assistant", "user", "assistant")]}
    assert step(messages)["messages"] == messages["messages"][1:]
    empty = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}
    assert step(empty) == Rejected("no question with an answer is left")
    assert ConversationRoles(empty="keep")(empty) is empty
    assert step({"conversations": "text"}) == Rejected("conversations is a str, expected a list of turns")
    assert step({"conversations": [{"from": "alien", "value": "x"}]}) == Rejected("turn 1 has no role that is known")
    assert step({"conversations": ["x"]}) == Rejected("turn 1 has no role that is known")
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    answer = {"role": "assistant", "content": "b"}
    assert step({"messages": [parts, parts, answer]}) == Rejected("turn 2 is the user's, as the one before it")


@given(st.text("hgs", max_size=9))
def test_any_turns_become_a_conversation_or_go(said):
    result = roles(said)
    if not isinstance(result, Rejected):
        row = Row(1, "row 1", result)
        record = conversation(row, conversation_turns(row))
        spoken = "".join(each.instruction + each.output for each in record.rounds) + record.system
        for place in range(said.index("h"), said.rindex("g") + 1):
            assert f"{said[place]}{place}" in spoken  # nothing between the first question and the last answer is lost


# --- lengths ---------------------------------------------------------------------------------------------


def test_lengths():
    row = item(10, 20)
    assert ConversationLength()(row) is row
    assert ConversationLength(min_rounds=3)(row) == Rejected("2 rounds, expected at least 3")
    assert ConversationLength(max_rounds=1)(row) == Rejected("2 rounds, expected at most 1")
    assert ConversationLength(min_chars=16)(row) == Rejected("answers of 15 characters, expected at least 16")


def test_splits_keep_every_round_the_last_one_too():
    """FastChat's split begins a piece at the round that does not fit, and never writes it where it is the last."""
    row = item(40, 40, 40, system="be brief")
    pieces = SplitConversations(max_length=100, per_turn=0)(row)
    assert [len(piece.record.rounds) for piece in pieces] == [2, 1]
    assert pieces[1].record.rounds[0] == row.record.rounds[2]
    assert all(piece.record.system == "be brief" and piece.number == 3 for piece in pieces)
    fits = item(40, 40)
    assert SplitConversations(max_length=80, per_turn=0)(fits) is fits
    assert len(SplitConversations(max_length=80, per_turn=1)(fits)) == 2


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 120))
def test_pieces_are_the_rounds_in_order_and_as_long_as_may_be(lengths, limit):
    row = item(*lengths)
    result = SplitConversations(max_length=limit, per_turn=0, too_long="keep")(row)
    pieces = result if isinstance(result, list) else [result]
    assert tuple(each for piece in pieces for each in piece.record.rounds) == row.record.rounds
    sizes = [[len(each.instruction + each.output) for each in piece.record.rounds] for piece in pieces]
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
    for one, other in itertools.pairwise(sizes):
        assert sum(one) + other[0] > limit


def test_one_round_over_the_limit():
    long = item(500)
    answer = SplitConversations(max_length=100)(long)
    assert answer == Flagged(long, "its one round has length 512, more than 100")
    assert SplitConversations(max_length=100, too_long="keep")(long) is long
    assert SplitConversations(max_length=100, too_long="reject")(item(10, 500)) == Rejected(
        "a round of length 512, expected at most 100"
    )
    assert [len(piece.record.rounds) for piece in SplitConversations(max_length=100)(item(10, 500, 10))] == [1, 1, 1]


def test_tokens_are_counted_with_a_tokenizer(stories260k):
    from jindo_core.tokenizer import load_tokenizer

    text = "Once upon a time, there was a little girl named Lily."
    tokens = len(load_tokenizer(stories260k).encode(text, bos=False))
    assert tokens < len(text)
    row = Item(Record((Round(text, "", text),) * 2), {}, 1)
    step = SplitConversations(max_length=4 * tokens + 8, tokenizer=str(stories260k), per_turn=2)
    assert step(row) is row
    assert len(SplitConversations(max_length=4 * tokens + 7, tokenizer=str(stories260k), per_turn=2)(row)) == 2
    assert pickle.loads(pickle.dumps(step)) == step


def test_rounds_apart():
    row = item(10, 20, 30)
    assert [piece.record.rounds for piece in SeparateRounds()(row)] == [(each,) for each in row.record.rounds]
    one = item(10)
    assert SeparateRounds()(one) is one


@pytest.mark.parametrize("step", STEPS)
def test_steps_can_be_sent_to_workers(step):
    assert pickle.loads(pickle.dumps(step())) == step()


def test_fastchats_own_conversations_are_well_formed(assets: Path):
    rows = json.loads((assets / "data/en/fastchat_dummy_conversation.json").read_text(encoding="utf-8"))
    assert all(ConversationRoles()(row) is row for row in rows)
