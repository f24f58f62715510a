"""Sums in registers, for the loops: what LLVM does not make of numba's own loops, which write sums for every few terms.

Emitted are vectors of 64 bytes, which LLVM splits where the processor's are shorter. Loads need not be aligned. numba's
cache looks at the file of the function that uses these: after a change here, `make clean`.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WORD, INT32 = ir.IntType(64), ir.IntType(32)


class Emitter:
    """Emits operations on vectors of numbers of the first argument's type; `wide`: of 64 bytes, otherwise of one.

    Arrays must be contiguous; places in them count numbers from their beginning.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, wide: bool) -> None:
        self.builder = builder
        number = context.get_value_type(signature.args[0].dtype)
        self.size: int = context.get_abi_sizeof(number)
        self.lanes = 64 // self.size if wide else 1
        self.vector = ir.VectorType(number, self.lanes)
        self.arguments = [
            context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]

    def plus(self, place: Any, more: Any) -> Any:
        return self.builder.add(place, ir.Constant(WORD, more) if isinstance(more, int) else more)

    def times(self, place: Any, factor: Any) -> Any:
        return self.builder.mul(place, ir.Constant(WORD, factor) if isinstance(factor, int) else factor)

    def number(self, array: Any, place: Any) -> Any:
        """One number of an array; places may be of 32 bits in it."""
        found = self.builder.load(self.builder.gep(array.data, [place]))
        return self.builder.sext(found, WORD) if found.type == INT32 else found

    def vectors(self, array: Any, place: Any, count: int) -> list[Any]:
        """`count` vectors, one after the other."""
        return [self.builder.load(self._address(array, place, v), align=self.size) for v in range(count)]

    def store(self, vectors: list[Any], array: Any, place: Any) -> None:
        for v, vector in enumerate(vectors):
            self.builder.store(vector, self._address(array, place, v), align=self.size)

    def _address(self, array: Any, place: Any, v: int) -> Any:
        address = self.builder.gep(array.data, [self.plus(place, v * self.lanes)])
        return self.builder.bitcast(address, self.vector.as_pointer())

    def prefetch(self, array: Any, place: Any, count: int) -> None:
        """Asks for the cache lines of `count` vectors."""
        byte = ir.IntType(8).as_pointer()
        declared = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
        instruction = cgutils.get_or_insert_function(self.builder.module, declared, "llvm.prefetch.p0")
        to_read, into_all_levels, data = (ir.Constant(INT32, value) for value in (0, 3, 1))
        for v in range(count):
            address = self.builder.bitcast(self.builder.gep(array.data, [self.plus(place, v * self.lanes)]), byte)
            self.builder.call(instruction, [address, to_read, into_all_levels, data])

    def spread(self, number: Any) -> Any:
        """A vector of one number."""
        nothing, zeros = ir.Constant(self.vector, ir.Undefined), ir.Constant(ir.VectorType(INT32, self.lanes), None)
        alone = self.builder.insert_element(nothing, number, ir.Constant(INT32, 0))
        return self.builder.shuffle_vector(alone, nothing, zeros)

    def multiply_add(self, x: Any, y: Any, total: Any) -> Any:
        product = self.builder.fmul(x, y, flags=("contract",))
        return self.builder.fadd(total, product, flags=("contract",))

    def sums(self, count: int) -> list[Any]:
        """Vectors of zeros that `add` changes; they stay in registers."""
        found = [cgutils.alloca_once(self.builder, self.vector) for _ in range(count)]
        for total in found:
            self.builder.store(ir.Constant(self.vector, None), total)
        return found

    def add(self, factor: Any, vectors: list[Any], sums: list[Any]) -> None:
        for vector, total in zip(vectors, sums, strict=True):
            self.builder.store(self.multiply_add(factor, vector, self.builder.load(total)), total)

    def halved(self, vectors: list[Any], share: int) -> Any:
        """Of one or two vectors in which each run of `share` lanes stands for a number, their sum: one vector with half
        as many lanes a number, in the same order."""
        lanes = range(sum(vector.type.count for vector in vectors))
        places = [[i for i in lanes if i % share // (share // 2) == half] for half in (0, 1)]
        kind = ir.VectorType(INT32, len(places[0]))
        halves = (self.builder.shuffle_vector(vectors[0], vectors[-1], ir.Constant(kind, some)) for some in places)
        return self.builder.fadd(*halves)


def make_tile(targets: int, vectors: int, wide: bool) -> Any:
    """Adds products of several targets and columns. All arrays are flat:

    sums[place[first + j] + c] += scale[c] sum_i G[g + i by_source + j by_target] rows[sources[i] + c], for `targets` j
    and as many c from `column` on as `vectors` hold.
    """

    @intrinsic
    def tile(typing_context, sums, place, first, rows, sources, G, g, by_source, by_target, scale, column):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(context, builder, signature, arguments, wide)
            sums, place, first, rows, sources, G, g, by_source, by_target, scale, column = emit.arguments
            totals = [emit.sums(vectors) for _ in range(targets)]
            with cgutils.for_range(builder, sources.nitems) as loop:
                read = emit.vectors(rows, emit.plus(emit.number(sources, loop.index), column), vectors)
                of_source = emit.plus(g, emit.times(loop.index, by_source))
                for j, of_target in enumerate(totals):
                    factor = emit.number(G, emit.plus(of_source, emit.times(by_target, j)))
                    emit.add(emit.spread(factor), read, of_target)
            scales = emit.vectors(scale, column, vectors)
            for j, of_target in enumerate(totals):
                at = emit.plus(emit.number(place, emit.plus(first, j)), column)
                old = emit.vectors(sums, at, vectors)
                new = [emit.multiply_add(s, builder.load(t), o) for s, t, o in zip(scales, of_target, old, strict=True)]
                emit.store(new, sums, at)
            return context.get_dummy_value()

        arguments = (sums, place, first, rows, sources, G, g, by_source, by_target, scale, column)
        return types.void(*arguments), generate

    return tile


AHEAD = 8  # pairs whose rows are asked for before they are added


def make_adder(vectors: int, wide: bool) -> Any:
    """Adds rows up: total[c] += sum_j values[j] rows[indices[j], c] for j from `start` to `end - 1`, and as many c from
    `column` on as `vectors` hold. `width`: of a row."""

    @intrinsic
    def adder(typing_context, total, rows, width, indices, values, start, end, column):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(context, builder, signature, arguments, wide)
            total, rows, width, indices, values, start, end, column = emit.arguments
            sums = emit.sums(vectors)
            last = builder.sub(end, ir.Constant(WORD, 1))
            with cgutils.for_range_slice(builder, start, end, ir.Constant(WORD, 1)) as (j, _):
                if wide:
                    later = builder.add(j, ir.Constant(WORD, AHEAD))
                    later = builder.select(builder.icmp_signed("<", later, last), later, last)
                    emit.prefetch(rows, emit.plus(emit.times(emit.number(indices, later), width), column), vectors)
                at = emit.plus(emit.times(emit.number(indices, j), width), column)
                emit.add(emit.spread(emit.number(values, j)), emit.vectors(rows, at, vectors), sums)
            old = emit.vectors(total, column, vectors)
            emit.store([builder.fadd(o, builder.load(s)) for o, s in zip(old, sums, strict=True)], total, column)
            return context.get_dummy_value()

        return types.void(total, rows, width, indices, values, start, end, column), generate

    return adder


def make_dots(count: int) -> Any:
    """Inner products with several rows: out[start + j] = sum_c x[c] rows[indices[start + j], c] for `count` (a power of
    two, at most 8) j, and the first `columns` c, a multiple of what 64 bytes hold. `width`: of a row."""

    @intrinsic
    def dots(typing_context, x, rows, width, indices, start, columns, out):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            emit = Emitter(context, builder, signature, arguments, True)
            x, rows, width, indices, start, columns, out = emit.arguments
            sums = emit.sums(count)
            begins = [emit.times(emit.number(indices, emit.plus(start, j)), width) for j in range(count)]
            nothing, step = ir.Constant(WORD, 0), ir.Constant(WORD, emit.lanes)
            last = builder.sub(indices.nitems, ir.Constant(WORD, 1))
            nexts = []
            for j in range(count if count > 1 else 0):
                place = emit.plus(emit.plus(start, count), j)
                place = builder.select(builder.icmp_signed("<", place, last), place, last)
                nexts.append(emit.times(emit.number(indices, place), width))
            with cgutils.for_range_slice(builder, nothing, columns, step) as (column, _):
                (own,) = emit.vectors(x, column, 1)
                for at in nexts:
                    emit.prefetch(rows, emit.plus(at, column), 1)
                emit.add(own, [emit.vectors(rows, emit.plus(at, column), 1)[0] for at in begins], sums)
            found = [builder.load(total) for total in sums]
            share = emit.lanes  # lanes of each row, whose sum is its product
            while len(found) > 1:
                found = [emit.halved([a, b], share) for a, b in zip(found[::2], found[1::2], strict=True)]
                share //= 2
            while share > 1:
                found = [emit.halved(found, share)]
                share //= 2
            address = builder.gep(out.data, [start])
            builder.store(found[0], builder.bitcast(address, found[0].type.as_pointer()), align=emit.size)
            return context.get_dummy_value()

        return types.void(x, rows, width, indices, start, columns, out), generate

    return dots


@intrinsic
def bits_of(typing_context, mask, place):  # type: ignore[no-untyped-def]
    """64 booleans of a mask as the bits of a word, the first the lowest."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        vector = ir.VectorType(ir.IntType(8), 64)
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), vector.as_pointer())
        found = builder.icmp_unsigned("!=", builder.load(address, align=1), ir.Constant(vector, None))
        return builder.bitcast(found, WORD)

    return types.uint64(mask, types.intp), generate


@intrinsic
def count_bits(typing_context, word):  # type: ignore[no-untyped-def]
    """Of a word, how many are set."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def trailing_zeros(typing_context, word):  # type: ignore[no-untyped-def]
    """Of a word: the processor's instruction, which numba does not offer; 64 where all are."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def prefetch(typing_context, numbers, place):  # type: ignore[no-untyped-def]
    """Asks for the cache line of a number; numba does not offer the processor's instruction."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        byte = ir.IntType(8).as_pointer()
        declared = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
        instruction = cgutils.get_or_insert_function(builder.module, declared, "llvm.prefetch.p0")
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), byte)
        to_read, into_second_level, data = (ir.Constant(INT32, value) for value in (0, 2, 1))
        builder.call(instruction, [address, to_read, into_second_level, data])
        return context.get_dummy_value()

    return types.void(numbers, types.intp), generate
