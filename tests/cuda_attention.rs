//! The kernels of attention against ops/attention.rs, on the processor. Queries, keys, values and gradients are numbers that bf16
//! holds, so that what is left of rounding is that of weights and of the gradients of scores.

use candor::ops::attention::{Heads, Span};
use candor::ops::norm::RmsNorm;
use candor::ops::rope::{Direction, Rotation};

use crate::attention::{KINDS, attend, attention, stored, tree};
use crate::check;
use crate::cuda_on_host::{
    File, Kernels, Launch, TURNS, Turns, alike, blocks, numbers, room, rounded, run, widened, written,
};

/// As the kernels have it.
#[repr(C)]
#[derive(Clone, Copy)]
struct DeviceSpan {
    query_start: i32,
    query_len: i32,
    prefix_start: i32,
    prefix_len: i32,
    own_start: i32,
    own_len: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Tile {
    span: i32,
    first: i32,
}

fn device_spans(spans: &[Span]) -> Vec<DeviceSpan> {
    let device = |Span { queries, prefix, own }: &Span| {
        let [query_start, query_len, prefix_start, prefix_len, own_start, own_len] =
            [queries.start, queries.len(), prefix.start, prefix.len(), own.start, own.len()]
                .map(|number| number as i32);
        DeviceSpan { query_start, query_len, prefix_start, prefix_len, own_start, own_len }
    };
    spans.iter().map(device).collect()
}

/// Tiles of as many rows of every span as `rows` says.
fn tiles(spans: &[Span], rows: impl Fn(&Span) -> usize) -> Vec<Tile> {
    let of_span = |(index, span): (usize, &Span)| {
        (0..rows(span)).step_by(64).map(move |first| [index, first]).collect::<Vec<_>>()
    };
    let all = spans.iter().enumerate().flat_map(of_span);
    all.map(|[span, first]| Tile { span: span as i32, first: first as i32 }).collect()
}

/// The numbers of a call, all of them held by bf16. Key rows that no span has are no numbers.
struct Inputs {
    heads: Heads,
    spans: Vec<Span>,
    rows: usize,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    grad: Vec<f32>,
}

fn inputs(heads: Heads, spans: &[Span]) -> Inputs {
    let rows = spans.iter().map(|span| span.queries.end).max().unwrap();
    let key_rows = spans.iter().map(|span| span.own.end.max(span.prefix.end)).max().unwrap();
    let held = |seed, count| widened(&rounded(&numbers(seed, count)));
    let (wide, narrow) = (heads.query * heads.dim, heads.key * heads.dim);
    Inputs {
        heads,
        spans: spans.to_vec(),
        rows,
        queries: held(1, rows * wide),
        keys: held(2, key_rows * narrow),
        values: held(3, key_rows * narrow),
        grad: held(4, rows * wide),
    }
}

impl Inputs {
    /// What the stores hold of keys or values.
    fn store(&self, values: &[f32]) -> Vec<u16> {
        let narrow = self.heads.key * self.heads.dim;
        let mut store = vec![0x7fc0; values.len()];
        let held = rounded(values);
        for rows in self.spans.iter().flat_map(|span| [&span.prefix, &span.own]) {
            store[rows.start * narrow..rows.end * narrow]
                .copy_from_slice(&held[rows.start * narrow..rows.end * narrow]);
        }
        store
    }

    /// The number that a kernel's name ends in.
    fn padded_dim(&self) -> usize {
        [64, 128, 256].into_iter().find(|&dim| dim >= self.heads.dim).unwrap()
    }
}

/// A window or a cap that is not there is 0.
fn numbers_of(heads: Heads) -> ([i32; 3], f32, i32) {
    let shape = [heads.query, heads.key, heads.dim].map(|number| number as i32);
    (shape, heads.soft_cap.unwrap_or(0.0), heads.window.unwrap_or(0) as i32)
}

/// What is returned, the same rounded, and the log-sums.
struct Attended {
    out: Vec<f32>,
    bits: Vec<u16>,
    log_sums: Vec<f32>,
}

/// One query row at a time.
fn by_rows(kernels: &Kernels, inputs: &Inputs, turns: Turns) -> Attended {
    let Heads { query, key, dim, scale, .. } = inputs.heads;
    let mut row_span = vec![-1i32; inputs.rows];
    for (index, span) in inputs.spans.iter().enumerate() {
        row_span[span.queries.clone()].fill(index as i32);
    }
    let (keys, values) = (inputs.store(&inputs.keys), inputs.store(&inputs.values));
    let (mut out, mut log_sums) = (room(inputs.queries.len()), room(inputs.rows * query));
    let mut bits = vec![0; inputs.queries.len()];
    let ([query_heads, key_heads, width], soft_cap, window) = numbers_of(inputs.heads);
    let spans = device_spans(&inputs.spans);
    let grid = [inputs.rows, key, (query / key).div_ceil(8)];
    run!(
        kernels,
        Launch { grid, threads: 256, shared_bytes: 0, turns },
        attention_rows(
            &inputs.queries[..],
            &keys[..],
            &values[..],
            &row_span[..],
            &spans[..],
            &mut out[..],
            &mut bits[..],
            &mut log_sums[..],
            inputs.rows as i32,
            query_heads,
            key_heads,
            width,
            scale,
            soft_cap,
            window
        )
    );
    assert_eq!(dim as i32, width);
    Attended { out: written(&out).to_vec(), bits, log_sums: written(&log_sums).to_vec() }
}

/// The kernel of this name for the dim of the inputs.
macro_rules! run_for_dim {
    ($kernels:expr, $dim:expr, $launch:expr, [$small:ident, $middle:ident, $large:ident], ($($argument:expr),* $(,)?)) => {
        match $dim {
            64 => run!($kernels, $launch, $small($($argument),*)),
            128 => run!($kernels, $launch, $middle($($argument),*)),
            _ => run!($kernels, $launch, $large($($argument),*)),
        }
    };
}

/// Tiles of queries on tensor cores.
fn by_tiles(kernels: &Kernels, inputs: &Inputs, turns: Turns) -> Attended {
    let tiles = tiles(&inputs.spans, |span| span.queries.len());
    let (keys, values) = (inputs.store(&inputs.keys), inputs.store(&inputs.values));
    let (mut out, mut log_sums) = (room(inputs.queries.len()), room(inputs.rows * inputs.heads.query));
    let mut bits = vec![0; inputs.queries.len()];
    let ([query_heads, key_heads, width], soft_cap, window) = numbers_of(inputs.heads);
    let (spans, dim) = (device_spans(&inputs.spans), inputs.padded_dim());
    let grid = [tiles.len(), inputs.heads.query, 1];
    run_for_dim!(
        kernels,
        dim,
        Launch { grid, threads: 128, shared_bytes: 256 * (dim + 8), turns },
        [attention_forward_64, attention_forward_128, attention_forward_256],
        (
            &inputs.queries[..],
            &keys[..],
            &values[..],
            &tiles[..],
            &spans[..],
            &mut out[..],
            &mut bits[..],
            &mut log_sums[..],
            query_heads,
            key_heads,
            width,
            inputs.heads.scale,
            soft_cap,
            window
        )
    );
    Attended { out: written(&out).to_vec(), bits, log_sums: written(&log_sums).to_vec() }
}

/// What is off is small beside what is wanted: on average, and everywhere.
#[track_caller]
fn off_by_rounding(name: &str, got: &[f32], want: &[f32]) {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let size = (want.iter().map(|&x| square(x)).sum::<f64>() / want.len() as f64).sqrt();
    let off = (got.iter().zip(want).map(|(got, want)| square(got - want)).sum::<f64>() / want.len() as f64).sqrt();
    assert!(off <= 0.004 * size.max(1e-4), "{name}: off by {off} of {size}");
    alike(name, got, want, 0.015);
}

/// Query heads, key heads and dim: groups of 1, 3 and more than a block takes, and every kernel's dim, filled or not.
const HEADS: [(usize, usize, usize); 6] = [(4, 2, 16), (2, 2, 64), (9, 1, 8), (3, 1, 80), (2, 1, 128), (1, 1, 256)];

/// Trees as the learner has them, with one and several tiles, and prefixes that end anywhere in a stretch of keys.
fn trees() -> Vec<Vec<Span>> {
    vec![tree(&[], 1, &[]), tree(&tree(&[], 33, &[1, 2]), 17, &[3, 70]), tree(&[], 66, &[64])]
}

/// What the sampler has: single rows and chunks of prompts whose keys lie anywhere.
fn cache() -> Vec<Span> {
    vec![
        Span { queries: 0..1, prefix: 32..49, own: 96..101 },
        Span { queries: 1..2, prefix: 32..49, own: 0..1 },
        Span { queries: 2..37, prefix: 0..0, own: 128..163 },
        Span { queries: 37..38, prefix: 0..0, own: 64..73 },
        Span { queries: 38..78, prefix: 128..163, own: 192..241 },
    ]
}

fn heads((query, key, dim): (usize, usize, usize), (soft_cap, window): (Option<f32>, Option<usize>)) -> Heads {
    Heads { query, key, dim, scale: 0.25, soft_cap, window }
}

#[test]
fn attention_of_both_kinds() {
    let Some(kernels) = Kernels::of(File::Attention) else { return };
    let layouts: Vec<Vec<Span>> = trees().into_iter().chain([cache()]).collect();
    for (shape, (index, spans)) in
        HEADS.into_iter().flat_map(|shape| layouts.iter().enumerate().map(move |it| (shape, it)))
    {
        // Every cap and window somewhere, not everywhere.
        for kind in if shape.2 == 16 { &KINDS[..] } else { &KINDS[index..=index] } {
            let heads = heads(shape, *kind);
            let inputs = inputs(heads, spans);
            let keys = stored(heads, &inputs.keys, &inputs.values, spans, check::f32_kernel());
            let (want, want_sums) = attend(heads, &inputs.queries, &keys, spans, check::f32_kernel());
            let turns = TURNS[index % 2];
            let rows = by_rows(kernels, &inputs, turns);
            let tiles = by_tiles(kernels, &inputs, turns);
            let name = format!("{heads:?}, layout {index}");
            alike(&format!("{name}, by rows"), &rows.out, &want, 3e-6);
            off_by_rounding(&format!("{name}, by tiles"), &tiles.out, &want);
            for (kind, attended) in [("by rows", &rows), ("by tiles", &tiles)] {
                alike(&format!("{name}, log-sums {kind}"), &attended.log_sums, &want_sums, 3e-6);
                assert_eq!(attended.bits, rounded(&attended.out), "{name}, {kind}");
            }
        }
    }
}

/// Catches a barrier that is missing, whichever turn hides it.
#[test]
fn turns_change_nothing() {
    let (Some(forward), Some(backward)) = (Kernels::of(File::Attention), Kernels::of(File::AttentionBackward)) else {
        return;
    };
    let inputs = inputs(heads((4, 2, 16), KINDS[3]), &trees()[1]);
    let all = TURNS.map(|turns| {
        let attended = by_tiles(forward, &inputs, turns);
        let gradients = gradients(backward, &inputs, &attended, turns);
        (by_rows(forward, &inputs, turns).out, attended.out, gradients)
    });
    assert_eq!(all[0], all[1]);
}

/// A query's bits are the same whatever is computed with it: the last rows of every span alone, and each row by itself.
#[test]
fn a_row_does_not_see_its_batch() {
    let Some(kernels) = Kernels::of(File::Attention) else { return };
    for kind in KINDS {
        let whole = inputs(heads((3, 1, 16), kind), &trees()[1]);
        let few = |span: &Span| Span {
            queries: span.queries.end - span.queries.len().min(7)..span.queries.end,
            ..span.clone()
        };
        let part = Inputs { spans: whole.spans.iter().map(few).collect(), ..inputs(whole.heads, &whole.spans) };
        let attended =
            [&whole, &part].map(|inputs| [by_rows(kernels, inputs, TURNS[0]), by_tiles(kernels, inputs, TURNS[0])]);
        let width = whole.heads.query * whole.heads.dim;
        for row in part.spans.iter().flat_map(|span| span.queries.clone()) {
            for (whole, part) in attended[0].iter().zip(&attended[1]) {
                let place = row * width..(row + 1) * width;
                assert_eq!(whole.out[place.clone()], part.out[place], "{kind:?}, row {row}");
            }
        }
    }
}

/// The gradients of queries, keys and values, by rows of the call.
fn gradients(kernels: &Kernels, inputs: &Inputs, attended: &Attended, turns: Turns) -> [Vec<f32>; 3] {
    let (rows, heads, dim) = (inputs.rows, inputs.heads, inputs.padded_dim());
    let ([query_heads, key_heads, width], soft_cap, window) = numbers_of(heads);
    let (keys, values) = (inputs.store(&inputs.keys), inputs.store(&inputs.values));
    let (mut queries_bits, mut grad_bits) = (vec![0u16; inputs.queries.len()], vec![0u16; inputs.queries.len()]);
    let (mut pulls, log_sums) = (room(rows * heads.query), &attended.log_sums[..]);
    run!(
        kernels,
        Launch { grid: [rows, heads.query, 1], threads: 32, shared_bytes: 0, turns },
        attention_backward_begin(
            &inputs.queries[..],
            heads.scale,
            &attended.out[..],
            &inputs.grad[..],
            &mut queries_bits[..],
            &mut grad_bits[..],
            &mut pulls[..],
            rows as i32,
            query_heads,
            width
        )
    );
    assert_eq!(grad_bits, rounded(&inputs.grad));
    let (spans, query_tiles) = (device_spans(&inputs.spans), tiles(&inputs.spans, |span| span.queries.len()));
    let mut d_queries = room(inputs.queries.len());
    run_for_dim!(
        kernels,
        dim,
        Launch { grid: [query_tiles.len(), heads.query, 1], threads: 128, shared_bytes: 384 * (dim + 8), turns },
        [attention_backward_queries_64, attention_backward_queries_128, attention_backward_queries_256],
        (
            &queries_bits[..],
            &keys[..],
            &values[..],
            &grad_bits[..],
            log_sums,
            &pulls[..],
            &query_tiles[..],
            &spans[..],
            &mut d_queries[..],
            query_heads,
            key_heads,
            width,
            heads.scale,
            soft_cap,
            window
        )
    );
    let sees = |reader: &Span, span: &Span| reader == span || reader.prefix == span.own;
    let (mut reader_start, mut readers) = (vec![0i32], Vec::new());
    for span in &inputs.spans {
        readers.extend((0..spans.len() as i32).filter(|&reader| sees(&inputs.spans[reader as usize], span)));
        reader_start.push(readers.len() as i32);
    }
    let key_tiles = tiles(&inputs.spans, |span| span.own.len());
    let narrow = heads.key * heads.dim;
    let (mut d_keys, mut d_values) = (room(rows * narrow), room(rows * narrow));
    run_for_dim!(
        kernels,
        dim,
        Launch { grid: [key_tiles.len(), heads.key, 1], threads: 256, shared_bytes: 512 * (dim + 8) + 10752, turns },
        [attention_backward_keys_64, attention_backward_keys_128, attention_backward_keys_256],
        (
            &queries_bits[..],
            &keys[..],
            &values[..],
            &grad_bits[..],
            log_sums,
            &pulls[..],
            &key_tiles[..],
            &spans[..],
            &reader_start[..],
            &readers[..],
            &mut d_keys[..],
            &mut d_values[..],
            query_heads,
            key_heads,
            width,
            soft_cap,
            window
        )
    );
    [d_queries, d_keys, d_values].map(|gradient| written(&gradient).to_vec())
}

#[test]
fn gradients_of_attention() {
    let (Some(forward), Some(backward)) = (Kernels::of(File::Attention), Kernels::of(File::AttentionBackward)) else {
        return;
    };
    let layouts = trees();
    for (shape, (index, spans)) in
        HEADS.into_iter().flat_map(|shape| layouts.iter().enumerate().map(move |it| (shape, it)))
    {
        for kind in if shape.2 == 16 { &KINDS[..] } else { &KINDS[index + 1..index + 2] } {
            let heads = heads(shape, *kind);
            let inputs = inputs(heads, spans);
            let x = [inputs.queries.clone(), inputs.keys.clone(), inputs.values.clone()];
            let [d_queries, d_keys, d_values] =
                (attention(&x, heads, spans, check::f32_kernel()).backward)(&inputs.grad).try_into().unwrap();
            let narrow = heads.key * heads.dim;
            // Of key rows, those of the call's rows.
            let of_rows = |gradient: Vec<f32>| -> Vec<f32> {
                let rows = spans.iter().flat_map(|span| span.own.clone());
                rows.flat_map(|row| gradient[row * narrow..(row + 1) * narrow].to_vec()).collect()
            };
            let turns = TURNS[index % 2];
            let attended = by_tiles(forward, &inputs, turns);
            let got = gradients(backward, &inputs, &attended, turns);
            let want = [d_queries, of_rows(d_keys), of_rows(d_values)];
            for ((part, got), want) in ["queries", "keys", "values"].into_iter().zip(&got).zip(&want) {
                off_by_rounding(&format!("{heads:?}, layout {index}, {part}"), got, want);
            }
        }
    }
}

/// Norms and rotations of heads as ops/norm.rs and ops/rope.rs have them; a row of no place is turned, and stored nowhere.
#[test]
fn heads_are_turned_into_their_rows() {
    let Some(kernels) = Kernels::of(File::Attention) else { return };
    let (to_row, positions) = ([4i32, 0, 2, -1], [0usize, 17, 3000, 5]);
    for ((query_heads, key_heads, dim), normalized) in
        [(5, 1, 16), (7, 2, 80), (9, 3, 256)].into_iter().flat_map(|shape| [(shape, false), (shape, true)])
    {
        let turns = TURNS[usize::from(normalized)];
        let frequencies: Vec<f64> = (0..dim / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / dim as f64)).collect();
        let rotation = Rotation::new(&positions, &frequencies);
        let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |&f| p as f32 * f as f32));
        let (cosines, sines): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        let norms = [8, 9].map(|seed| RmsNorm { gain: numbers(seed, dim), epsilon: 1e-5 });
        let [mut queries, keys, values] =
            [(1, query_heads), (2, key_heads), (3, key_heads)].map(|(seed, heads)| numbers(seed, 4 * heads * dim));
        let turned = |x: &[f32], norm: &RmsNorm| {
            let mut y = x.to_vec();
            if normalized {
                norm.forward(x, &mut y);
            }
            rotation.apply(&mut y, 0..4, Direction::Forward, 1.0);
            y
        };
        let (want, want_keys) = (turned(&queries, &norms[0]), turned(&keys, &norms[1]));
        let gains = norms.each_ref().map(|norm| match normalized {
            true => norm.gain.as_ptr().cast_mut(),
            false => std::ptr::null_mut(),
        });
        let narrow = key_heads * dim;
        // One row before the first.
        let mut stores = [(); 2].map(|()| vec![7u16; 6 * narrow]);
        let [key_store, value_store] = &mut stores;
        let [query_count, key_count, width] = [query_heads, key_heads, dim].map(|number| number as i32);
        run!(
            kernels,
            blocks(4, 256, turns),
            store_heads(
                &mut queries[..],
                &keys[..],
                &values[..],
                gains[0],
                gains[1],
                1e-5f32,
                &cosines[..],
                &sines[..],
                &to_row[..],
                &mut key_store[narrow..],
                &mut value_store[narrow..],
                4i32,
                query_count,
                key_count,
                width
            )
        );
        let name = format!("{query_heads} {key_heads} {dim} {normalized}");
        alike(&name, &queries, &want, 2e-6);
        for (row, &to) in to_row[..3].iter().enumerate() {
            let to = to as usize + 1;
            let (from, to) = (row * narrow..(row + 1) * narrow, to * narrow..(to + 1) * narrow);
            alike(&format!("{name}, keys"), &widened(&stores[0][to.clone()]), &want_keys[from.clone()], 4e-3);
            assert_eq!(stores[1][to], rounded(&values[from]), "{name}, values");
        }
        for row in [0, 2, 4] {
            assert!(stores.iter().all(|store| store[row * narrow..(row + 1) * narrow].iter().all(|&bits| bits == 7)));
        }
    }
}

/// Heads that are no multiple of 8 lie anywhere in memory; they are walked row by row only.
#[test]
fn heads_of_any_even_width_by_rows() {
    let Some(kernels) = Kernels::of(File::Attention) else { return };
    for (shape, kind) in [((2, 1, 6), KINDS[0]), ((4, 2, 50), KINDS[3])] {
        let (heads, spans) = (heads(shape, kind), cache());
        let inputs = inputs(heads, &spans);
        let keys = stored(heads, &inputs.keys, &inputs.values, &spans, check::f32_kernel());
        let (want, _) = attend(heads, &inputs.queries, &keys, &spans, check::f32_kernel());
        alike(&format!("{heads:?}"), &by_rows(kernels, &inputs, TURNS[0]).out, &want, 3e-6);
    }
}
