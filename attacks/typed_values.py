"""Values of an index that are JSON, and not what the encoding makes."""

from __future__ import annotations

import base64
import json

from attacks.corpus import attack
from attacks.hashes import MODULUS


def value_is(workshop, value):
    text = value if isinstance(value, str) else json.dumps(value)
    workshop.row("thing.name", value=text)


@attack
def value_of_an_unknown_tag(workshop):
    """A tag that asks for a type by name."""
    value_is(workshop, {"$object": ["os", "system", ["true"]]})


@attack
def value_of_two_tags(workshop):
    """Two tags in one object, of which a reader may take either."""
    value_is(workshop, {"$tuple": [1], "$set": [2]})


@attack
def value_with_a_key_twice(workshop):
    """One key twice, of which a reader may take either."""
    value_is(workshop, '{"lr": 0.1, "lr": 0.2}')


@attack
def value_with_an_encoded_key_twice(workshop):
    """The same, in the encoding of dicts with other keys than strings."""
    value_is(workshop, {"$dict": [[1, "a"], [1, "b"]]})


@attack
def value_nested_without_end(workshop):
    """Brackets in brackets."""
    value_is(workshop, "[" * 100_000 + "]" * 100_000)


@attack
def value_with_endless_digits(workshop):
    """A number of a million digits."""
    value_is(workshop, "9" * 1_000_000)


@attack
def value_that_is_nan(workshop):
    """NaN as it stands, which JSON does not have."""
    value_is(workshop, "NaN")


@attack
def array_of_objects(workshop):
    """An array whose elements are pointers to Python objects, taken from the file."""
    value_is(workshop, {"$ndarray": ["|O", [1], base64.b64encode(bytes(8)).decode()]})


@attack
def array_of_records(workshop):
    """A dtype given as a dict, in which numpy takes offsets and sizes as they are."""
    record = {"names": ["a"], "formats": ["O"], "offsets": [0], "itemsize": 8}
    value_is(workshop, {"$ndarray": [record, [1], base64.b64encode(bytes(8)).decode()]})


@attack
def array_in_numpys_grammar(workshop):
    """A dtype in numpy's own grammar of sub-arrays: one element of it is a gigabyte."""
    value_is(workshop, {"$numpy": ["(16384,16384)i4", ""]})


@attack
def array_of_a_terabyte(workshop):
    """A shape that its bytes do not fill."""
    value_is(workshop, {"$ndarray": ["<f4", [1 << 40], ""]})


@attack
def array_with_a_negative_size(workshop):
    """A size of -1, which numpy and torch take for "as many as there are"."""
    value_is(workshop, {"$ndarray": ["<f4", [-1], base64.b64encode(bytes(8)).decode()]})


@attack
def array_of_endless_empty_texts(workshop):
    """A trillion texts of no bytes."""
    value_is(workshop, {"$ndarray": ["<U0", [1 << 40], ""]})


@attack
def tensor_of_an_unknown_dtype(workshop):
    """A name of torch that is no dtype."""
    value_is(workshop, {"$tensor": ["load", [1], ""]})


@attack
def tensor_of_no_bytes_and_an_exabyte(workshop):
    """A shape whose product is zero, and overflows on the way."""
    value_is(workshop, {"$tensor": ["float32", [1 << 62, 1 << 62, 0], ""]})


@attack
def size_beyond_64_bits(workshop):
    """A torch.Size of a number that torch can't hold."""
    value_is(workshop, {"$size": [1 << 80]})


@attack
def device_that_does_not_exist(workshop):
    """A device of another name."""
    value_is(workshop, {"$device": "os:system"})


@attack
def complex_without_parts(workshop):
    """A number without its parts."""
    value_is(workshop, {"$complex": []})


@attack
def set_of_lists(workshop):
    """A set of what can't be in one."""
    value_is(workshop, {"$set": [[1]]})


@attack
def bytes_that_are_not(workshop):
    """Base64 with something else in it."""
    value_is(workshop, {"$bytes": "!!!!"})


@attack
def set_of_numbers_of_one_hash(workshop):
    """A set of multiples of 2**61 - 1, which all have the hash 0: each is compared with each."""
    value_is(workshop, {"$set": [number * (2**61 - 1) for number in range(60_000)]})


@attack
def dict_of_tuples_of_one_hash(workshop):
    """The same in the keys of a dict, a tuple around each."""
    value_is(workshop, {"$dict": [[{"$tuple": [number * (2**61 - 1)]}, 0] for number in range(60_000)]})


@attack
def text_of_characters_that_do_not_exist(workshop):
    """A NumPy text whose character is number 2**32 - 1: an internal error of the interpreter when it is taken out."""
    value_is(workshop, {"$numpy": ["<U1", base64.b64encode(b"\xff" * 4).decode()]})


@attack
def texts_of_characters_that_do_not_exist(workshop):
    """The same in an array, for whoever looks into it later."""
    value_is(workshop, {"$ndarray": [">U2", [1], base64.b64encode(b"\xff" * 8).decode()]})


@attack
def value_of_sets_in_a_set_of_one_hash(workshop):
    """A set of 300 sets of 300 numbers, all of one hash: each pair of sets is compared number by number."""
    numbers = [number * MODULUS for number in range(301)]
    value_is(workshop, {"$set": [{"$frozenset": numbers[:at] + numbers[at + 1 :]} for at in range(300)]})


@attack
def value_that_divides_by_zero(workshop):
    """Two NumPy times in a set, one in units of no seconds: to compare them is a division, and ends the process."""
    data = base64.b64encode(bytes(8)).decode()
    value_is(workshop, {"$set": [{"$numpy": ["<M8[0s]", data]}, {"$numpy": ["<M8[s]", data]}]})


@attack
def value_of_empty_lists(workshop):
    """Fifteen million empty lists in a value of forty-five megabytes."""
    value_is(workshop, "[" + "[]," * 15_000_000 + "[]]")
