//! The kernels of the head against ops/head.rs, on the processor.

use candor::ops::head::{Choice, Logits, choose, log_probabilities, log_probabilities_backward};
use candor::ops::panels::Panels;

use crate::check;
use crate::cuda_on_host::{File, Kernels, Launch, TURNS, Turns, alike, blocks, numbers, room, run, widened, written};

/// Logits as they come from the weight, and the hidden states and weight that they are made of: each row of hidden states picks a
/// column of the weight, so that nothing is rounded on the way.
struct Raw {
    rows: usize,
    vocabulary: usize,
    logits: Vec<f32>,
    hidden: Vec<f32>,
    weight: Panels,
}

fn raw(rows: usize, vocabulary: usize, size: f32) -> Raw {
    let logits: Vec<f32> = numbers(1, rows * vocabulary).iter().map(|x| size * x).collect();
    let hidden = (0..rows * rows).map(|i| if i / rows == i % rows { 1.0 } else { 0.0 }).collect();
    let columns: Vec<f32> =
        (0..vocabulary).flat_map(|token| logits.iter().skip(token).step_by(vocabulary)).copied().collect();
    let weight = Panels::pack(&columns, rows, check::f32_kernel());
    Raw { rows, vocabulary, logits, hidden, weight }
}

impl Raw {
    /// The logits of some tokens, [rows, tokens].
    fn chunk(&self, first: usize, tokens: usize) -> Vec<f32> {
        self.logits.chunks(self.vocabulary).flat_map(|row| &row[first..first + tokens]).copied().collect()
    }
}

const LOGITS: [Logits; 4] = [
    Logits { soft_cap: None, temperature: 1.0 },
    Logits { soft_cap: None, temperature: 0.75 },
    Logits { soft_cap: Some(3.0), temperature: 1.0 },
    Logits { soft_cap: Some(3.0), temperature: 1.5 },
];

/// Rows, tokens of the vocabulary, and how many at a time.
const SHAPES: [(usize, usize, usize); 4] = [(1, 1, 1), (3, 300, 128), (2, 2500, 1000), (5, 700, 700)];

/// A row's numbers on the way through the vocabulary.
struct Tallies {
    max: Vec<f32>,
    sum: Vec<f64>,
    weighted: Vec<f64>,
    chosen: Vec<f32>,
}

/// Log-probabilities, entropies and log-sums, in chunks.
fn tally(kernels: &Kernels, raw: &Raw, targets: &[u32], logits: Logits, chunk: usize, launch: Launch) -> [Vec<f32>; 3] {
    let (rows, cap) = (raw.rows as i32, logits.soft_cap.unwrap_or(0.0));
    let unknown = f64::NAN;
    let mut tallies = Tallies {
        max: room(raw.rows),
        sum: vec![unknown; raw.rows],
        weighted: vec![unknown; raw.rows],
        chosen: room(raw.rows),
    };
    for first in (0..raw.vocabulary).step_by(chunk) {
        let tokens = chunk.min(raw.vocabulary - first);
        let block = raw.chunk(first, tokens);
        let Tallies { max, sum, weighted, chosen } = &mut tallies;
        run!(
            kernels,
            launch,
            tally(
                &block[..],
                rows,
                first as i32,
                tokens as i32,
                cap,
                1.0 / logits.temperature,
                targets,
                &mut max[..],
                &mut sum[..],
                &mut weighted[..],
                &mut chosen[..]
            )
        );
    }
    let mut results = [(); 3].map(|()| room(raw.rows));
    let [logprobs, entropies, log_sums] = &mut results;
    let Tallies { max, sum, weighted, chosen } = &tallies;
    run!(
        kernels,
        blocks(1, 256, launch.turns),
        tally_end(
            &max[..],
            &sum[..],
            &weighted[..],
            &chosen[..],
            &mut logprobs[..],
            &mut entropies[..],
            &mut log_sums[..],
            rows
        )
    );
    results.map(|result| written(&result).to_vec())
}

#[test]
fn log_probabilities_entropies_and_gradients() {
    let Some(kernels) = Kernels::of(File::Head) else { return };
    for ((rows, vocabulary, chunk), logits) in SHAPES.into_iter().flat_map(|shape| LOGITS.map(|logits| (shape, logits)))
    {
        let (raw, name) = (raw(rows, vocabulary, 2.0), format!("head, {rows} rows, {vocabulary} tokens, {logits:?}"));
        let targets: Vec<u32> = (0..rows).map(|row| ((vocabulary - 1) * (row + 1) / rows) as u32).collect();
        let grad = numbers(2, rows);
        let mut want = vec![0.0; raw.hidden.len()];
        let known = log_probabilities(&raw.hidden, &raw.weight, &targets, logits, Some(&mut want)).unwrap();
        log_probabilities_backward(&mut want, &raw.weight, &targets, logits, &known, &grad);
        for turns in TURNS {
            let launch = blocks(rows, 256, turns);
            let [logprobs, entropies, log_sums] = tally(kernels, &raw, &targets, logits, chunk, launch);
            alike(&name, &logprobs, &known.logprobs, 1e-6);
            alike(&format!("{name}, entropy"), &entropies, &known.entropies().collect::<Vec<f32>>(), 2e-6);
            let mut d_hidden = vec![0.0f32; rows * rows];
            for first in (0..vocabulary).step_by(chunk) {
                let tokens = chunk.min(vocabulary - first);
                let (block, mut gradient) = (raw.chunk(first, tokens), vec![0u16; rows * tokens]);
                run!(
                    kernels,
                    launch,
                    logit_gradient(
                        &block[..],
                        &mut gradient[..],
                        rows as i32,
                        first as i32,
                        tokens as i32,
                        logits.soft_cap.unwrap_or(0.0),
                        logits.temperature,
                        &targets[..],
                        &log_sums[..],
                        &grad[..]
                    )
                );
                // Times the weight, whose columns are the rows' logits.
                for (row, gradient) in widened(&gradient).chunks(tokens).enumerate() {
                    for (column, weight) in block.chunks(tokens).enumerate() {
                        let share: f32 = gradient.iter().zip(weight).map(|(gradient, weight)| gradient * weight).sum();
                        d_hidden[row * rows + column] += share;
                    }
                }
            }
            alike(&format!("{name}, gradient"), &d_hidden, &want, 4e-3);
        }
    }
}

/// Every place of the distribution, and what a greedy choice takes.
#[test]
fn choices() {
    let Some(kernels) = Kernels::of(File::Head) else { return };
    // Stretches of one chunk of 256 tokens, and of more.
    let cases = [(1, 1), (7, 2), (7, 300), (7, 1500), (7, 40_000), (2, 300_000)];
    for ((rows, vocabulary), logits) in cases.into_iter().flat_map(|shape| LOGITS.map(|logits| (shape, logits))) {
        let raw = raw(rows, vocabulary, 3.0);
        let places = [-1.0, 0.0, 0.999_999_999_999, 0.5, 0.123, 0.777, -1.0];
        compare(kernels, &raw, &places[..rows], logits);
    }
}

/// Tokens that cannot be are not chosen at the ends of the distribution, and the lowest of equals is.
#[test]
fn choices_at_the_ends() {
    let Some(kernels) = Kernels::of(File::Head) else { return };
    let mut raw = raw(3, 900, 0.0);
    raw.logits.fill(-1e4);
    for (row, token) in [(0, 5), (0, 600), (1, 299), (1, 400), (2, 7), (2, 899)] {
        raw.logits[row * 900 + token] = 1.0;
    }
    let columns: Vec<f32> = (0..900).flat_map(|token| raw.logits.iter().skip(token).step_by(900)).copied().collect();
    raw.weight = Panels::pack(&columns, 3, check::f32_kernel());
    for places in [[0.0, 0.0, 0.0], [0.499, 0.501, 0.999_999_999_999], [-1.0, -1.0, -1.0]] {
        compare(kernels, &raw, &places, LOGITS[0]);
    }
}

/// Runs both kernels for rows [rows, vocabulary].
fn run_choose(
    kernels: &Kernels,
    logits_v: &[f32],
    places: &[f64],
    logits: Logits,
    turns: Turns,
) -> (Vec<u32>, Vec<f32>, Vec<f32>) {
    let (rows, vocabulary) = (places.len(), logits_v.len() / places.len());
    let (soft_cap, temperature) = (logits.soft_cap.unwrap_or(0.0), logits.temperature);
    let mut stretches = room(rows * 3 * 1024);
    run!(
        kernels,
        Launch { grid: [rows, 3, 1], threads: 256, shared_bytes: 0, turns },
        choose_stretches(logits_v, rows as i32, vocabulary as i32, soft_cap, temperature, &mut stretches[..])
    );
    let stretches = written(&stretches);
    let (mut tokens, mut logprobs, mut untempered) = (vec![u32::MAX; rows], room(rows), room(rows));
    run!(
        kernels,
        blocks(rows, 256, turns),
        choose(
            logits_v,
            stretches,
            rows as i32,
            vocabulary as i32,
            soft_cap,
            temperature,
            places,
            &mut tokens[..],
            &mut logprobs[..],
            &mut untempered[..]
        )
    );
    (tokens, written(&logprobs).to_vec(), written(&untempered).to_vec())
}

/// A row that is no number says so.
#[test]
fn a_choice_from_nan_is_no_number() {
    let Some(kernels) = Kernels::of(File::Head) else { return };
    for bad in [f32::NAN, f32::INFINITY] {
        let mut logits = numbers(1, 300);
        logits[150] = bad;
        for place in [-1.0, 0.5] {
            let at = Logits { soft_cap: None, temperature: 0.5 };
            let (token, logprob, untempered) = run_choose(kernels, &logits, &[place], at, TURNS[0]);
            assert!(!logprob[0].is_finite() || !untempered[0].is_finite(), "{bad} at {place}");
            assert!(token[0] < 300, "{bad} at {place}: {}", token[0]);
        }
    }
}

#[track_caller]
fn compare(kernels: &Kernels, raw: &Raw, places: &[f64], logits: Logits) {
    let choice = |&place: &f64| if place < 0.0 { Choice::Greedy } else { Choice::Sample(place) };
    let choices: Vec<Choice> = places.iter().map(choice).collect();
    let want = choose(&raw.hidden, &raw.weight, &choices, logits).unwrap();
    for turns in TURNS {
        let name = format!("{} tokens, {places:?}, {logits:?}", raw.vocabulary);
        let (tokens, logprobs, untempered) = run_choose(kernels, &raw.logits, places, logits, turns);
        assert_eq!(tokens, want.iter().map(|chosen| chosen.token).collect::<Vec<u32>>(), "{name}");
        alike(&name, &logprobs, &want.iter().map(|chosen| chosen.logprob).collect::<Vec<f32>>(), 2e-6);
        let want: Vec<f32> = want.iter().map(|chosen| chosen.untempered).collect();
        alike(&name, &untempered, &want, 2e-6);
    }
}
