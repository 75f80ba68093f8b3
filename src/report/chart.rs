//! A chart as data: axes, and layers of lines, bands, dots and bars.

/// A range of numbers with a name and a unit.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What is measured, with its unit.
    pub label: String,
    /// Its ends.
    pub range: (f64, f64),
    /// Whether only whole numbers are meaningful.
    pub whole: bool,
    /// What the whole numbers from 0 on stand for; none where they are numbers.
    pub names: &'static [&'static str],
}

impl Axis {
    /// A share or probability.
    pub fn share(label: &str) -> Self {
        Self { label: label.into(), range: (0.0, 1.0), whole: false, names: &[] }
    }

    /// An axis that shows all values, with some room above and below; `None` where there is none.
    pub fn around(label: &str, values: impl Iterator<Item = f64>) -> Option<Self> {
        let (low, high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let room = if low < high { (high - low) * 0.06 } else { low.abs().max(1.0) * 0.1 };
        (low <= high).then(|| Self { label: label.into(), range: (low - room, high + room), whole: false, names: &[] })
    }

    /// Round numbers within the range, at most `count` of them: multiples of 1, 2 or 5 times a power of ten.
    pub fn ticks(&self, count: usize) -> Vec<f64> {
        let (low, high) = self.range;
        let step = self.step(count);
        let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
        (first..=last).map(|tick| tick as f64 * step).collect()
    }

    /// A tick as text, with the decimals that tell it from its neighbors.
    pub fn tick(&self, value: f64, count: usize) -> String {
        if let Some(name) = self.names.get(value as usize) {
            return name.to_string();
        }
        let power = |value: f64| value.log10().floor() as i32;
        let (step, largest) = (power(self.step(count)), self.range.0.abs().max(self.range.1.abs()));
        let text = match largest {
            tiny if tiny < 1e-3 => format!("{value:.*e}", (power(tiny) - step).max(0) as usize),
            _ => format!("{value:.*}", (-step).max(0) as usize),
        };
        if value.abs() < self.step(count) / 2.0 { "0".into() } else { text.replace('-', "−") }
    }

    fn step(&self, count: usize) -> f64 {
        let least = (self.range.1 - self.range.0) / count as f64;
        let power = 10f64.powf(least.log10().floor());
        let round = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
        // The comparison allows for the rounding of the power.
        let step = round.into_iter().find(|step| *step >= least * (1.0 - 1e-9)).unwrap_or(10.0 * power);
        if self.whole { step.max(1.0).round() } else { step }
    }
}

/// A measured point.
#[derive(Clone, Copy, Debug)]
pub struct Dot {
    /// Where.
    pub at: (f64, f64),
    /// Its radius in pixels.
    pub radius: f64,
    /// The ends of its interval, if it has one.
    pub interval: Option<(f64, f64)>,
}

/// Something drawn.
#[derive(Clone, Debug)]
pub enum Mark {
    /// A line with a gap wherever a value is missing; a point between two gaps is a dot.
    Line {
        /// Its points.
        points: Vec<(f64, Option<f64>)>,
        /// Whether it is broken: a guide or a baseline.
        dashed: bool,
    },
    /// What lies between two values at each x.
    Band(Vec<(f64, f64, f64)>),
    /// Points.
    Dots(Vec<Dot>),
    /// From, to, and height.
    Bars(Vec<(f64, f64, f64)>),
    /// From, to, and the whole number that it lies around.
    Spans(Vec<(f64, f64, f64)>),
}

/// A mark with its color, and its name where the legend has it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its name in the legend.
    pub name: Option<String>,
    /// Index of a subject's color; `None` is a guide's gray.
    pub color: Option<usize>,
    /// What is drawn.
    pub mark: Mark,
}

impl Layer {
    /// A named line of a subject.
    pub fn line(name: impl Into<String>, color: usize, points: Vec<(f64, Option<f64>)>) -> Self {
        Self { name: Some(name.into()), color: Some(color), mark: Mark::Line { points, dashed: false } }
    }

    /// A broken gray line that others are compared with.
    pub fn guide(name: Option<&str>, points: &[(f64, f64)]) -> Self {
        let points = points.iter().map(|&(x, y)| (x, Some(y))).collect();
        Self { name: name.map(str::to_string), color: None, mark: Mark::Line { points, dashed: true } }
    }

    /// An unnamed mark of a subject.
    pub fn of(color: usize, mark: Mark) -> Self {
        Self { name: None, color: Some(color), mark }
    }
}

/// One chart.
#[derive(Clone, Debug)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// Left to right.
    pub x: Axis,
    /// Bottom to top.
    pub y: Axis,
    /// From the back to the front.
    pub layers: Vec<Layer>,
    /// Bars in a strip below, over the same x: where the data is. Heights are relative to the highest.
    pub strip: Vec<Layer>,
}

/// Charts that belong together: one file.
#[derive(Clone, Debug)]
pub struct Figure {
    /// The file's name, without its ending.
    pub name: &'static str,
    /// Its heading.
    pub title: String,
    /// How to read it.
    pub caption: String,
    /// Its charts.
    pub charts: Vec<Chart>,
}
