//! The objectives against TRL's own numbers, other trainers' formulas, and the vectors: values and gradients.

use candor::objective::{
    Counts, Implicit, Importance, ImportanceLevel, ImportanceMode, Judged, JudgedLoss, KlEstimator, LossMean,
    Objective, Pair, PolicyGradient, PolicyLoss, Preference, PreferenceLoss, Ratio, Sampled, Sequence, demonstration,
    judged, policy_gradient, preference,
};
use serde_json::Value;

use crate::check::{all_close, close, floats, golden, json, vectors};

/// One completion with everything that any objective asks for.
#[derive(Clone, Debug)]
pub struct Row {
    pub logprobs: Vec<f64>,
    pub behavior: Vec<f64>,
    pub reference: Vec<f64>,
    pub mask: Vec<bool>,
    pub advantage: f64,
}

impl Row {
    pub fn sequence(&self) -> Sequence<'_> {
        Sequence { logprobs_t: &self.logprobs, reference_t: Some(&self.reference), mask_t: &self.mask }
    }

    pub fn sampled(&self) -> Sampled<'_> {
        Sampled { sequence: self.sequence(), behavior_t: &self.behavior, advantage: self.advantage }
    }
}

pub fn sampled(rows: &[Row]) -> Vec<Sampled<'_>> {
    rows.iter().map(Row::sampled).collect()
}

pub fn counts(rows: &[Row], max_tokens: usize) -> Counts {
    Counts::of(rows.iter().map(|row| row.mask.as_slice()), max_tokens)
}

/// PPO's clip at 0.2, token mean, nothing else.
pub const PLAIN: PolicyGradient = PolicyGradient {
    policy_loss: PolicyLoss::Clip,
    ratio: Ratio::Token,
    clip: [0.2, 0.2],
    delta: None,
    loss_mean: LossMean::Token,
    importance: Importance { level: ImportanceLevel::None, mode: ImportanceMode::Truncate, max: 2.0 },
    kl: 0.0,
    kl_estimator: KlEstimator::K3,
};

fn matrix(value: &Value) -> Vec<Vec<f64>> {
    value.as_array().expect("a list of lists").iter().map(floats).collect()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key}: not a number in {value}"))
}

fn check_against(name: &str, got: &Objective, loss: f64, coefficients: &[Vec<f64>], tolerance: f64) {
    close(&format!("{name}: loss"), got.loss, loss, tolerance);
    assert_eq!(got.coefficients.len(), coefficients.len(), "{name}: sequences");
    for (index, (got, want)) in got.coefficients.iter().zip(coefficients).enumerate() {
        all_close(&format!("{name}: gradient of sequence {index}"), got, want, tolerance);
    }
}

#[test]
fn golden_trl_grpo_loss() {
    let Some(path) = golden("trl/grpo_loss.json") else { return };
    let file = json(&path);
    let inputs = &file["inputs"];
    let [logprobs, old, reference] = ["logps", "old_logps", "ref_logps"].map(|key| matrix(&inputs[key]));
    let max_tokens = number(inputs, "max_completion_length") as usize;
    let mut checked = 0;
    for (index, case) in file["cases"].as_array().expect("cases").iter().enumerate() {
        let kind = case["loss_type"].as_str().expect("loss_type");
        let name = format!("case {index}, {kind}");
        let loss_mean = match kind {
            "grpo" => LossMean::Sequence,
            "bnpo" | "dapo" | "cispo" => LossMean::Token,
            "dr_grpo" => LossMean::Constant,
            _ => {
                crate::check::skipped(kind);
                continue;
            }
        };
        let behavior = if case["old_is_none"] == true { &logprobs } else { &old };
        let rows = (0..logprobs.len()).map(|row| Row {
            logprobs: logprobs[row].clone(),
            behavior: behavior[row].clone(),
            reference: reference[row].clone(),
            mask: (0..logprobs[row].len())
                .map(|t| t < case["mask_lens"][row].as_u64().expect("a length") as usize)
                .collect(),
            advantage: inputs["advantages"][row].as_f64().expect("an advantage"),
        });
        let rows = rows.collect::<Vec<_>>();
        let cispo = kind == "cispo";
        let high = number(case, "epsilon_high");
        let settings = PolicyGradient {
            policy_loss: if cispo { PolicyLoss::Cispo } else { PolicyLoss::Clip },
            ratio: if case["importance_sampling_level"] == "sequence" { Ratio::Sequence } else { Ratio::Token },
            // TRL's CISPO takes the cap itself, ours what it exceeds 1 by.
            clip: [number(case, "epsilon_low"), if cispo { high - 1.0 } else { high }],
            delta: case["delta"].as_f64(),
            loss_mean,
            kl: number(case, "beta"),
            kl_estimator: KlEstimator::Unbiased,
            ..PLAIN
        };
        let mut counts = counts(&rows, max_tokens);
        if matches!(kind, "dapo" | "cispo") {
            counts.tokens = number(case, "num_items_in_batch");
        }
        let got = policy_gradient(&sampled(&rows), &settings, &counts).unwrap();
        check_against(&name, &got, number(case, "loss"), &matrix(&case["grad"]), 1e-7);

        let metrics = got.metrics.values();
        if let Some(kl) = case["metrics"]["kl"].as_f64() {
            close(&format!("{name}: kl"), metrics["kl"], kl, 1e-7);
        }
        // TRL counts a clipped sequence once, we count its tokens; its CISPO metric leaves out negative advantages.
        if settings.ratio == Ratio::Token && !cispo {
            close(&format!("{name}: low"), metrics["clip/low"], number(&case["metrics"], "clip_ratio/low_mean"), 1e-7);
            close(
                &format!("{name}: high"),
                metrics["clip/high"],
                number(&case["metrics"], "clip_ratio/high_mean"),
                1e-7,
            );
        }
        checked += 1;
    }
    assert!(checked > 0, "no case was checked");
}

#[test]
fn golden_formulas() {
    let Some(path) = golden("formulas.json") else { return };
    let file = json(&path);
    let inputs = &file["inputs"];
    let plain = PolicyGradient { clip: [number(inputs, "eps_low"), number(inputs, "eps_high")], ..PLAIN };
    let cispo = |cap: f64| PolicyGradient { policy_loss: PolicyLoss::Cispo, clip: [0.2, cap - 1.0], ..plain };
    let kl = |kl_estimator| PolicyGradient { kl: 0.04, kl_estimator, ..plain };
    let prime = |clip| PolicyGradient { policy_loss: PolicyLoss::Prime, clip: [clip; 2], ..plain };
    let mut checked = 0;
    for (name, case) in file["cases"].as_object().expect("cases") {
        let settings = match name.as_str() {
            "bnpo" | "dapo" => plain,
            "grpo" => PolicyGradient { loss_mean: LossMean::Sequence, ..plain },
            "dr_grpo" | "dr_grpo_centered_adv" => PolicyGradient { loss_mean: LossMean::Constant, ..plain },
            "cispo_eh5" => cispo(5.0),
            "cispo_eh1.1" => cispo(1.1),
            "gspo_sequence_level" => PolicyGradient { loss_mean: LossMean::Sequence, ratio: Ratio::Sequence, ..plain },
            "dapo_beta.04_k3" => kl(KlEstimator::K3),
            "dapo_beta.04_k3_unbiased" => kl(KlEstimator::Unbiased),
            "dapo_delta1.5" => PolicyGradient { delta: Some(1.5), ..plain },
            "prime_default_centered_adv" => prime(0.2),
            "prime_default_mask0.05" => prime(0.05),
            _ => {
                crate::check::skipped(name);
                continue;
            }
        };
        let is_prime = settings.policy_loss == PolicyLoss::Prime;
        let centered = is_prime || name.ends_with("centered_adv");
        let advantages = floats(&file["advantages"][if centered { "none" } else { "group" }]);
        let behavior = matrix(&inputs[if is_prime { "sampling" } else { "old" }]);
        let rows = matrix(&inputs["new"]).into_iter().enumerate().map(|(row, logprobs)| Row {
            logprobs,
            behavior: behavior[row].clone(),
            reference: floats(&inputs["ref"][row]),
            mask: floats(&inputs["mask"][row]).iter().map(|&live| live == 1.0).collect(),
            advantage: advantages[row],
        });
        let rows = rows.collect::<Vec<_>>();
        let counts = counts(&rows, number(inputs, "max_completion_length") as usize);
        let got = policy_gradient(&sampled(&rows), &settings, &counts).unwrap();
        // The file has seven digits of each gradient.
        check_against(name, &got, number(case, "loss"), &matrix(&case["grad_new_logps"]), 6e-8);
        close(&format!("{name}: loss"), got.loss, number(case, "loss"), 1e-9);
        if settings.kl_estimator == KlEstimator::K3 {
            close("k3", got.metrics.values()["kl"], number(&file["kl_masked_mean"], "k3"), 1e-12);
        }
        checked += 1;
    }
    assert!(checked > 0, "no case was checked");
}

/// A completion of `length` tokens whose log-probabilities add up to a given sum, likewise its reference's.
fn spread(logprob: f64, reference: f64, length: usize) -> Row {
    let each = |total: f64| vec![total / length as f64; length];
    Row {
        logprobs: each(logprob),
        behavior: vec![],
        reference: each(reference),
        mask: vec![true; length],
        advantage: 0.0,
    }
}

/// `names`: the keys of the chosen and rejected sums, of the same for the reference, and of the lengths.
fn pairs_of(inputs: &Value, names: [&str; 6]) -> Vec<[Row; 2]> {
    let [chosen, rejected, reference_chosen, reference_rejected, chosen_lengths, rejected_lengths] =
        names.map(|name| floats(&inputs[name]));
    let pair = |index: usize| {
        [
            spread(chosen[index], reference_chosen[index], chosen_lengths[index] as usize),
            spread(rejected[index], reference_rejected[index], rejected_lengths[index] as usize),
        ]
    };
    (0..chosen.len()).map(pair).collect()
}

pub fn prefer(pairs: &[[Row; 2]], settings: &Preference) -> Objective {
    let batch =
        pairs.iter().map(|[chosen, rejected]| Pair { chosen: chosen.sequence(), rejected: rejected.sequence() });
    let counts = Counts { tokens: 0.0, sequences: pairs.len() as f64, max_tokens: 0.0 };
    preference(&batch.collect::<Vec<_>>(), settings, &counts).unwrap()
}

#[test]
fn golden_trl_dpo_loss() {
    let Some(path) = golden("trl/dpo_loss.json") else { return };
    let file = json(&path);
    let names =
        ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "chosen_lens", "rejected_lens"];
    let pairs = pairs_of(&file["inputs"], names);
    let chosen = pairs.iter().map(|[chosen, _]| chosen.clone()).collect::<Vec<_>>();
    let mut checked = 0;
    for case in file["cases"].as_array().expect("cases") {
        let kind = case["loss_type"].as_str().expect("loss_type");
        let smoothing = number(case, "label_smoothing");
        let (loss, smoothing) = match kind {
            "sft" => {
                let sequences = chosen.iter().map(Row::sequence).collect::<Vec<_>>();
                let got = demonstration(&sequences, LossMean::Token, &counts(&chosen, 0)).unwrap();
                let want = floats(&case["grad_wrt_sum_logp_chosen"]).into_iter().zip(&chosen);
                let want = want.map(|(slope, row)| vec![slope; row.mask.len()]).collect::<Vec<_>>();
                check_against(kind, &got, number(case, "loss"), &want, 1e-7);
                checked += 1;
                continue;
            }
            // TRL ignores the smoothing here; we refuse it.
            "sigmoid" => (PreferenceLoss::Sigmoid, 0.0),
            "robust" => (PreferenceLoss::Robust, smoothing),
            "ipo" => (PreferenceLoss::IpoMean, smoothing),
            "hinge" => (PreferenceLoss::Hinge, smoothing),
            _ => {
                crate::check::skipped(kind);
                continue;
            }
        };
        let got = prefer(&pairs, &Preference { loss, beta: number(case, "beta"), smoothing });
        let name = format!("{kind}, beta {}", case["beta"]);
        let slopes = [floats(&case["grad_wrt_sum_logp_chosen"]), floats(&case["grad_wrt_sum_logp_rejected"])];
        let want = pairs.iter().enumerate().flat_map(|(index, pair)| {
            let slopes = &slopes;
            pair.iter().enumerate().map(move |(side, row)| vec![slopes[side][index]; row.mask.len()])
        });
        // TRL's gradient by the sum; under `ipo` that sum is divided by the length, which its numbers already include.
        check_against(&name, &got, number(case, "loss"), &want.collect::<Vec<_>>(), 1e-7);
        let metrics = got.metrics.values();
        for metric in ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"] {
            close(&format!("{name}: {metric}"), metrics[metric], number(&case["metrics"], metric), 1e-7);
        }
        checked += 1;
    }
    assert!(checked > 0, "no case was checked");
}

#[test]
fn golden_formulas_dpo() {
    let Some(path) = golden("formulas.json") else { return };
    let file = json(&path);
    let dpo = &file["dpo"];
    let names = ["chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len"];
    let pairs = pairs_of(&dpo["inputs"], names);
    let beta = number(&dpo["inputs"], "beta");
    let cases = [
        ("sigmoid", PreferenceLoss::Sigmoid, 0.0),
        ("hinge", PreferenceLoss::Hinge, 0.0),
        ("ipo", PreferenceLoss::IpoMean, 0.0),
        ("dpo robust label_smoothing=.1", PreferenceLoss::Robust, 0.1),
    ];
    for (name, loss, smoothing) in cases {
        let got = prefer(&pairs, &Preference { loss, beta, smoothing });
        close(name, got.loss, number(dpo, name), 1e-12);
        if name == "sigmoid" {
            let slopes = [0, 2].map(|sequence| got.coefficients[sequence][0]);
            all_close("slope", &slopes, &floats(&dpo["grad_sigmoid_wrt_chosen_logp"]), 1e-12);
        }
    }
    crate::check::skipped("sigmoid_norm");
}

/// The two sequences of `losses.json`.
struct Vectors {
    theta: Vec<Vec<Vec<f64>>>,
    tokens: Vec<Vec<usize>>,
    rows: Vec<Row>,
    counts: Counts,
}

impl Vectors {
    fn new(inputs: &Value) -> Self {
        let [logprobs, reference, behavior] = ["logp", "ref_logp", "old_logp"].map(|key| matrix(&inputs[key]));
        let rows = (0..2).map(|row| Row {
            logprobs: logprobs[row].clone(),
            behavior: behavior[row].clone(),
            reference: reference[row].clone(),
            mask: floats(&inputs["mask"][row]).iter().map(|&live| live == 1.0).collect(),
            advantage: 0.0,
        });
        let rows = rows.collect::<Vec<_>>();
        let tokens = matrix(&inputs["tokens"]).iter().map(|row| row.iter().map(|&id| id as usize).collect()).collect();
        let theta = inputs["theta"].as_array().expect("theta").iter().map(matrix).collect();
        // The constant of `drgrpo_const`, which the file does not state: its coefficients are multiples of 1/16.
        let counts = counts(&rows, 8);
        Self { theta, tokens, rows, counts }
    }

    fn objective(&self, name: &str, case: &Value) -> Option<Objective> {
        let sequences = self.rows.iter().map(Row::sequence).collect::<Vec<_>>();
        let number = |key| number(case, key);
        Some(match name.split(['_', '-']).next()? {
            "sft" => {
                let mean = if name == "sft_token_mean" { LossMean::Token } else { LossMean::Sequence };
                demonstration(&sequences, mean, &self.counts).unwrap()
            }
            "dpo" if case["label_smoothing"].is_number() => {
                let smoothing = number("label_smoothing");
                let loss = if smoothing > 0.0 { PreferenceLoss::Smoothed } else { PreferenceLoss::Sigmoid };
                self.preference(Preference { loss, beta: number("beta"), smoothing })
            }
            "ipo" => self.preference(Preference { loss: PreferenceLoss::Ipo, beta: number("beta"), smoothing: 0.0 }),
            "implicit" if case["lam"].is_number() => {
                let loss = if name.starts_with("implicit_mse") { JudgedLoss::Mse } else { JudgedLoss::Log };
                let settings = Implicit { loss, lambda: number("lam"), lm_on_correct_only: false };
                let correct = floats(&case["y"]);
                let batch = sequences.iter().zip(correct).map(|(&sequence, y)| Judged { sequence, correct: y == 1.0 });
                judged(&batch.collect::<Vec<_>>(), &settings, &self.counts).unwrap()
            }
            "grpo" | "drgrpo" => {
                let loss_mean = match case["norm"].as_str()? {
                    "seq" => LossMean::Sequence,
                    "tok" => LossMean::Token,
                    _ => LossMean::Constant,
                };
                let clip = [number("eps_low"), number("eps_high")];
                let settings = PolicyGradient { clip, loss_mean, kl: number("beta_k3"), ..PLAIN };
                let mut batch = sampled(&self.rows);
                batch.iter_mut().zip(floats(&case["adv"])).for_each(|(row, advantage)| row.advantage = advantage);
                policy_gradient(&batch, &settings, &self.counts).unwrap()
            }
            _ => return None,
        })
    }

    fn preference(&self, settings: Preference) -> Objective {
        prefer(&[[self.rows[0].clone(), self.rows[1].clone()]], &settings)
    }

    /// The coefficients carried through log softmax to the logits.
    fn logit_gradients(&self, objective: &Objective) -> Vec<Vec<Vec<f64>>> {
        let rows = self.theta.iter().zip(&self.tokens).zip(&objective.coefficients);
        rows.map(|((theta, tokens), coefficients)| {
            let positions = theta.iter().zip(tokens).zip(coefficients);
            positions.map(|((logits, &token), &coefficient)| logit_gradient(logits, token, coefficient)).collect()
        })
        .collect()
    }
}

/// coefficient · ∂ log softmax(logits)\[token\] / ∂ logits.
fn logit_gradient(logits: &[f64], token: usize, coefficient: f64) -> Vec<f64> {
    let total = logits.iter().map(|logit| logit.exp()).sum::<f64>();
    let column = |(id, logit): (usize, &f64)| coefficient * (f64::from(id == token) - logit.exp() / total);
    logits.iter().enumerate().map(column).collect()
}

#[test]
fn vectors_losses() {
    let Some(path) = vectors("losses.json") else { return };
    let file = json(&path);
    let inputs = Vectors::new(&file["inputs"]);
    let mut checked = 0;
    for (name, case) in file.as_object().expect("cases").iter().filter(|(name, _)| *name != "inputs") {
        match name.as_str() {
            "implicit_sign_table" => sign_table(case),
            "kl_estimators" => k3_coefficients(&inputs, case),
            "dpo_shared_prefix" => shared_prefix(case),
            _ => match inputs.objective(name, case) {
                None => {
                    crate::check::skipped(name);
                    continue;
                }
                Some(got) => {
                    // The file's A is −∂loss/∂ℓ.
                    let want =
                        matrix(&case["A"]).iter().map(|row| row.iter().map(|a| -a).collect()).collect::<Vec<_>>();
                    check_against(name, &got, number(case, "loss"), &want, 1e-12);
                    for (row, gradient) in inputs.logit_gradients(&got).iter().enumerate() {
                        for (position, want) in matrix(&case["grad"][row]).iter().enumerate() {
                            all_close(&format!("{name}: logits {row}, {position}"), &gradient[position], want, 1e-10);
                        }
                    }
                }
            },
        }
        checked += 1;
    }
    assert!(checked > 10, "only {checked} entries were checked");
}

/// One token of probability p, with the language-model term on every row as in the table.
fn sign_table(table: &Value) {
    for case in table.as_array().expect("rows") {
        let logprob = number(case, "p").ln();
        let row = spread(logprob, 0.0, 1);
        let batch = [Judged { sequence: row.sequence(), correct: case["y"] == 1 }];
        for (loss, key) in [(JudgedLoss::Mse, "mse_coef"), (JudgedLoss::Log, "log_coef")] {
            let settings = Implicit { loss, lambda: number(case, "lam"), lm_on_correct_only: false };
            let got = judged(&batch, &settings, &counts(std::slice::from_ref(&row), 1)).unwrap();
            // The table has the slope before it is capped at 5.
            let want = if loss == JudgedLoss::Log { number(case, key).max(1.0 - 5.0) } else { number(case, key) };
            close(&format!("{key} of {case}"), -got.coefficients[0][0], want, 1e-12);
        }
    }
}

/// Without an advantage the divergence is all there is.
fn k3_coefficients(inputs: &Vectors, case: &Value) {
    for (index, row) in inputs.rows.iter().enumerate() {
        let row = Row { mask: vec![true; row.mask.len()], ..row.clone() };
        let counts = Counts { tokens: 1.0, sequences: 1.0, max_tokens: 1.0 };
        let got = policy_gradient(&[row.sampled()], &PolicyGradient { kl: 1.0, ..PLAIN }, &counts).unwrap();
        close("k3", got.loss, floats(&case["k3"][index]).iter().sum(), 1e-12);
        let ascent = got.coefficients[0].iter().map(|w| -w).collect::<Vec<_>>();
        all_close("k3 coefficients", &ascent, &floats(&case["k3_coef_on_logp"][index]), 1e-12);
    }
}

/// Two completions that differ in their last token: the shared ones get no gradient at all.
fn shared_prefix(case: &Value) {
    let theta = matrix(&case["theta"]);
    let prefix = floats(&case["prefix_tokens"]);
    let side = |last: &str, reference_last: &str| {
        let mut tokens = prefix.iter().map(|&id| id as usize).collect::<Vec<_>>();
        tokens.push(number(case, last) as usize);
        let logprob = |(logits, &token): (&Vec<f64>, &usize)| {
            logits[token] - logits.iter().map(|logit| logit.exp()).sum::<f64>().ln()
        };
        let logprobs = theta.iter().zip(&tokens).map(logprob).collect::<Vec<_>>();
        let mut reference = logprobs.clone();
        reference[prefix.len()] = number(case, reference_last);
        let row = Row { behavior: vec![], mask: vec![true; tokens.len()], advantage: 0.0, logprobs, reference };
        (tokens, row)
    };
    let (chosen, rejected) =
        (side("chosen_token", "ref_logp_last_chosen"), side("rejected_token", "ref_logp_last_rejected"));
    let settings = Preference { loss: PreferenceLoss::Sigmoid, beta: number(case, "beta"), smoothing: 0.0 };
    let got = prefer(&[[chosen.1, rejected.1]], &settings);
    close("shared prefix: loss", got.loss, number(case, "loss"), 1e-12);
    close("shared prefix: coefficient", -got.coefficients[0][0], number(case, "coef"), 1e-12);
    for (position, want) in matrix(&case["grad"]).iter().enumerate() {
        let up = logit_gradient(&theta[position], chosen.0[position], got.coefficients[0][position]);
        let down = logit_gradient(&theta[position], rejected.0[position], got.coefficients[1][position]);
        let both = up.iter().zip(&down).map(|(up, down)| up + down).collect::<Vec<_>>();
        all_close(&format!("shared prefix: logits {position}"), &both, want, 1e-12);
        if position < prefix.len() {
            assert!(both.iter().all(|gradient| *gradient == 0.0), "shared position {position}: {both:?}");
        }
    }
}
