//! Logistic regression of a few features by Newton's method, as the calibration maps need it.

/// Answers that share their features; the constant is one of them.
pub struct Observation<const D: usize> {
    /// What the log-odds are linear in.
    pub features: [f64; D],
    /// How many are correct; may be a fraction.
    pub correct: f64,
    /// How many are not.
    pub wrong: f64,
}

/// Newton steps after which there is no convergence.
const STEPS: usize = 100;

/// Weights w that minimize Σ −ln p + ½ Σ ridge (w − start)², where σ(w·features) is the probability of a correct answer. `None` where there is
/// no minimum: separable or constant data without a ridge.
pub fn logistic<const D: usize>(observations: &[Observation<D>], start: [f64; D], ridge: [f64; D]) -> Option<[f64; D]> {
    let loss = |weights: &[f64; D]| {
        let data: f64 = observations
            .iter()
            .map(|one| {
                let odds = dot(weights, &one.features);
                one.correct * softplus(-odds) + one.wrong * softplus(odds)
            })
            .sum();
        let pull = (0..D).map(|j| 0.5 * ridge[j] * (weights[j] - start[j]).powi(2));
        data + pull.sum::<f64>()
    };
    let mut weights = start;
    for _ in 0..STEPS {
        let (mut gradient, mut hessian) = ([0.0; D], [[0.0; D]; D]);
        for j in 0..D {
            gradient[j] = ridge[j] * (weights[j] - start[j]);
            hessian[j][j] = ridge[j];
        }
        for Observation { features, correct, wrong } in observations {
            let p = sigmoid(dot(&weights, features));
            let (slope, curve) = ((correct + wrong) * p - correct, (correct + wrong) * p * (1.0 - p));
            for i in 0..D {
                gradient[i] += slope * features[i];
                (0..D).for_each(|j| hessian[i][j] += curve * features[i] * features[j]);
            }
        }
        let step = solve(hessian, gradient)?;
        let (before, mut share) = (loss(&weights), 1.0);
        let moved = |share: f64| std::array::from_fn(|j| weights[j] - share * step[j]);
        // Rounding may leave the loss a little above what it was at the minimum itself.
        while loss(&moved(share)) > before * (1.0 + 1e-14) && share > 1e-6 {
            share *= 0.5;
        }
        weights = moved(share);
        if step.iter().zip(&weights).all(|(step, weight)| step.abs() <= 1e-11 * (1.0 + weight.abs())) {
            return Some(weights);
        }
    }
    None
}

/// σ(x) = 1 / (1 + e⁻ˣ).
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// ln(1 + eˣ), without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn dot<const D: usize>(left: &[f64; D], right: &[f64; D]) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}

/// The solution of a symmetric system, by elimination with pivots; `None` where it is singular.
fn solve<const D: usize>(mut matrix: [[f64; D]; D], mut right: [f64; D]) -> Option<[f64; D]> {
    let scale = matrix.iter().flatten().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    for column in 0..D {
        let pivot = (column..D).max_by(|&i, &j| matrix[i][column].abs().total_cmp(&matrix[j][column].abs()))?;
        // Separable data flatten the loss until nothing but rounding is left of its curvature.
        if matrix[pivot][column].abs() <= 1e-12 * scale || scale < 1e-9 {
            return None;
        }
        matrix.swap(column, pivot);
        right.swap(column, pivot);
        for row in column + 1..D {
            let factor = matrix[row][column] / matrix[column][column];
            (column..D).for_each(|j| matrix[row][j] -= factor * matrix[column][j]);
            right[row] -= factor * right[column];
        }
    }
    for column in (0..D).rev() {
        let known: f64 = (column + 1..D).map(|j| matrix[column][j] * right[j]).sum();
        right[column] = (right[column] - known) / matrix[column][column];
    }
    Some(right)
}
