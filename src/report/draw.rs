//! Charts drawn: as SVG, and as PNG without any font of the system's.

use std::sync::Once;

use anyhow::{Result, anyhow};
use plotters::backend::BitMapBackend;
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::{
    Circle, DrawingArea, DrawingBackend, FontStyle, IntoDrawingArea, IntoTextStyle, PathElement, Polygon, RGBColor,
    Rectangle, SVGBackend, ShapeStyle, Text,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontTransform, register_font};

use super::chart::{Axis, Chart, Dot, Figure, Layer, Mark};

/// Pixels of the drawing per pixel of the layout: sharp on dense screens, and the SVG's whole numbers are half pixels.
const SCALE: f64 = 2.0;
/// A chart's width and height in the layout.
const SIZE: (f64, f64) = (420.0, 300.0);
/// The height of a chart with a strip.
const TALL: f64 = 370.0;
/// Height of the strip below a chart.
const STRIP: f64 = 56.0;
/// Height of letters.
const TITLE: f64 = 15.0;
/// See [`TITLE`].
const LABEL: f64 = 12.5;

/// Text, and what the page recolors in the dark: see `page.css`.
pub const INK: RGBColor = RGBColor(0x1f, 0x29, 0x33);
/// Lines behind the data.
pub const GRID: RGBColor = RGBColor(0xe1, 0xe5, 0xea);
/// Guides.
pub const GUIDE: RGBColor = RGBColor(0x7b, 0x87, 0x94);
/// The colors of Okabe and Ito, which the color-blind tell apart.
pub const PALETTE: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x5b, 0x4b, 0x8a),
];
const BACKGROUND: RGBColor = RGBColor(0xff, 0xff, 0xff);

/// The font that text is measured and drawn with: Latin, Greek and Cyrillic letters of DejaVu Sans.
const FONT: &[u8] = include_bytes!("DejaVuSans.ttf");

type Area<B> = DrawingArea<B, Shift>;

/// All charts of a figure beside and below each other, as a PNG file's bytes.
///
/// # Errors
/// None that input could cause.
pub fn png(figure: &Figure) -> Result<Vec<u8>> {
    let (width, height, columns) = grid(figure);
    let mut pixels = vec![0; 3 * width as usize * height as usize];
    compose(figure, BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area(), columns)?;
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(bytes)
}

/// All charts of a figure as an SVG file.
///
/// # Errors
/// None that input could cause.
pub fn svg(figure: &Figure) -> Result<String> {
    let (width, height, columns) = grid(figure);
    let mut text = String::new();
    compose(figure, SVGBackend::with_string(&mut text, (width, height)).into_drawing_area(), columns)?;
    Ok(text)
}

/// One chart as SVG, without background.
///
/// # Errors
/// None that input could cause.
pub fn chart_svg(chart: &Chart) -> Result<String> {
    let mut text = String::new();
    let size = (px(SIZE.0) as u32, px(height(chart)) as u32);
    let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
    draw(chart, &area).and_then(|()| area.present().map_err(failed))?;
    drop(area);
    Ok(text)
}

/// Width and height of a figure in pixels, and how many charts stand beside each other.
fn grid(figure: &Figure) -> (u32, u32, usize) {
    let count = figure.charts.len().max(1);
    let columns = if count == 4 { 2 } else { count.min(if count > 9 { 5 } else { 3 }) };
    let tallest = figure.charts.iter().map(height).fold(0.0, f64::max);
    (px(SIZE.0 * columns as f64) as u32, px(tallest * count.div_ceil(columns) as f64) as u32, columns)
}

fn height(chart: &Chart) -> f64 {
    if chart.strip.is_empty() { SIZE.1 } else { TALL }
}

fn compose<B: DrawingBackend>(figure: &Figure, area: Area<B>, columns: usize) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.fill(&BACKGROUND).map_err(failed)?;
    let cells = area.split_evenly((figure.charts.len().div_ceil(columns), columns));
    figure.charts.iter().zip(&cells).try_for_each(|(chart, cell)| draw(chart, cell))?;
    area.present().map_err(failed)
}

fn failed(error: impl std::error::Error) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

/// Pixels of the drawing.
fn px(layout: f64) -> i32 {
    (layout * SCALE).round() as i32
}

fn color(layer: &Layer) -> RGBColor {
    layer.color.map_or(GUIDE, |index| PALETTE[index % PALETTE.len()])
}

fn stroke(color: RGBColor, width: f64) -> ShapeStyle {
    color.stroke_width(px(width) as u32)
}

/// Where numbers lie on the drawing.
struct Frame<'a> {
    x: &'a Axis,
    y: &'a Axis,
    /// Left, top, right and bottom, in pixels of the drawing.
    edges: (i32, i32, i32, i32),
}

impl Frame<'_> {
    fn at(&self, x: f64, y: f64) -> (i32, i32) {
        let (left, top, right, bottom) = self.edges;
        let part = |value: f64, (low, high): (f64, f64)| (value - low) / (high - low);
        let across = part(x, self.x.range) * f64::from(right - left);
        let up = part(y, self.y.range) * f64::from(bottom - top);
        (left + across.round() as i32, bottom - up.round() as i32)
    }
}

/// Ticks of the two axes.
const TICKS: (usize, usize) = (6, 7);

fn draw<B: DrawingBackend>(chart: &Chart, area: &Area<B>) -> Result<()>
where
    B::ErrorType: 'static,
{
    let (width, height) = area.dim_in_pixel();
    let top = heading(chart, area, width as i32)?;
    let strip = if chart.strip.is_empty() { 0 } else { px(STRIP) };
    let ticks: Vec<String> = chart.y.ticks(TICKS.1).iter().map(|tick| chart.y.tick(*tick, TICKS.1)).collect();
    let widest = ticks.iter().map(|tick| text_width(area, tick, LABEL)).max().unwrap_or(0);
    let (left, right) = (px(LABEL + 16.0) + widest, width as i32 - px(14.0));
    let bottom = height as i32 - px(2.0 * LABEL + 18.0) - strip;
    let frame = Frame { x: &chart.x, y: &chart.y, edges: (left, top, right, bottom) };
    axes(&frame, area, strip)?;
    chart.layers.iter().try_for_each(|layer| mark(layer, &frame, area))?;
    if strip > 0 {
        let highest = chart.strip.iter().flat_map(|layer| match &layer.mark {
            Mark::Bars(bars) => bars.as_slice(),
            _ => &[],
        });
        let highest = highest.map(|bar| bar.2).fold(f64::MIN_POSITIVE, f64::max);
        let y = Axis { label: String::new(), range: (0.0, highest), whole: false, names: &[] };
        let frame = Frame { x: &chart.x, y: &y, edges: (left, bottom + px(8.0), right, bottom + strip) };
        line(area, &[(left, bottom + strip), (right, bottom + strip)], stroke(GRID, 1.0))?;
        chart.strip.iter().try_for_each(|layer| mark(layer, &frame, area))?;
    }
    Ok(())
}

/// The title and the legend; where the chart begins below them.
fn heading<B: DrawingBackend>(chart: &Chart, area: &Area<B>, width: i32) -> Result<i32>
where
    B::ErrorType: 'static,
{
    text(area, &chart.title, (px(10.0), px(8.0)), TITLE, (HPos::Left, VPos::Top))?;
    let (mut x, mut y) = (px(10.0), px(TITLE + 16.0));
    for layer in &chart.layers {
        let Some(name) = &layer.name else { continue };
        let needed = px(24.0) + text_width(area, name, LABEL);
        if x > px(10.0) && x + needed > width - px(6.0) {
            (x, y) = (px(10.0), y + px(LABEL + 5.0));
        }
        let middle = y + px(LABEL / 2.0);
        let (swatch, style) = ([(x, middle), (x + px(18.0), middle)], stroke(color(layer), 2.5));
        match &layer.mark {
            Mark::Line { dashed: true, .. } => dashes(area, &swatch, style)?,
            Mark::Line { .. } => line(area, &swatch, style)?,
            Mark::Dots(_) => dot(area, (x + px(9.0), middle), 4.0, color(layer))?,
            Mark::Band(_) | Mark::Bars(_) | Mark::Spans(_) => {
                let corners = [(x, y + px(1.0)), (x + px(18.0), y + px(LABEL - 1.0))];
                area.draw(&Rectangle::new(corners, color(layer).mix(0.5).filled())).map_err(failed)?;
            }
        }
        text(area, name, (x + px(23.0), middle), LABEL, (HPos::Left, VPos::Center))?;
        x += needed + px(14.0);
    }
    let any = chart.layers.iter().any(|layer| layer.name.is_some());
    Ok(y + if any { px(LABEL + 12.0) } else { 0 })
}

/// Grid, ticks and names of both axes. The x axis is named below a strip.
fn axes<B: DrawingBackend>(frame: &Frame, area: &Area<B>, strip: i32) -> Result<()>
where
    B::ErrorType: 'static,
{
    let (left, top, right, bottom) = frame.edges;
    for tick in frame.y.ticks(TICKS.1) {
        let (_, y) = frame.at(frame.x.range.0, tick);
        line(area, &[(left, y), (right, y)], stroke(GRID, 1.0))?;
        text(area, &frame.y.tick(tick, TICKS.1), (left - px(6.0), y), LABEL, (HPos::Right, VPos::Center))?;
    }
    let below = bottom + strip;
    for tick in frame.x.ticks(TICKS.0) {
        let (x, _) = frame.at(tick, frame.y.range.0);
        line(area, &[(x, top), (x, below)], stroke(GRID, 1.0))?;
        text(area, &frame.x.tick(tick, TICKS.0), (x, below + px(5.0)), LABEL, (HPos::Center, VPos::Top))?;
    }
    line(area, &[(left, bottom), (right, bottom)], stroke(GUIDE, 1.0))?;
    let center = (left + right) / 2;
    text(area, &frame.x.label, (center, below + px(LABEL + 9.0)), LABEL, (HPos::Center, VPos::Top))?;
    let style = ("sans-serif", px(LABEL)).into_text_style(area).color(&INK).pos(Pos::new(HPos::Center, VPos::Top));
    let style = style.transform(FontTransform::Rotate270);
    area.draw(&Text::new(frame.y.label.clone(), (px(4.0), (top + bottom) / 2), style)).map_err(failed)
}

fn mark<B: DrawingBackend>(layer: &Layer, frame: &Frame, area: &Area<B>) -> Result<()>
where
    B::ErrorType: 'static,
{
    let color = color(layer);
    match &layer.mark {
        Mark::Line { points, dashed } => {
            for part in points.split(|(_, y)| y.is_none()) {
                let part: Vec<_> = part.iter().filter_map(|&(x, y)| Some(frame.at(x, y?))).collect();
                match part[..] {
                    [] => {}
                    [one] => dot(area, one, 2.5, color)?,
                    _ if *dashed => dashes(area, &part, stroke(color, 1.5))?,
                    _ => line(area, &part, stroke(color, 2.0))?,
                }
            }
            Ok(())
        }
        Mark::Band(edges) => {
            let upper = edges.iter().map(|&(x, _, high)| frame.at(x, high));
            let lower = edges.iter().rev().map(|&(x, low, _)| frame.at(x, low));
            let outline: Vec<_> = upper.chain(lower).collect();
            area.draw(&Polygon::new(outline, color.mix(0.18).filled())).map_err(failed)
        }
        Mark::Dots(dots) => dots.iter().try_for_each(|&Dot { at, radius, interval }| {
            if let Some((low, high)) = interval {
                line(area, &[frame.at(at.0, low), frame.at(at.0, high)], stroke(color, 1.5))?;
            }
            dot(area, frame.at(at.0, at.1), radius, color)
        }),
        Mark::Bars(bars) => bars.iter().try_for_each(|&(from, to, height)| {
            let corners = [frame.at(from, height), frame.at(to, 0.0f64.max(frame.y.range.0))];
            area.draw(&Rectangle::new(corners, color.mix(0.5).filled())).map_err(failed)
        }),
        Mark::Spans(spans) => spans.iter().try_for_each(|&(from, to, lane)| {
            let corners = [frame.at(from, lane + 0.36), frame.at(to, lane - 0.36)];
            area.draw(&Rectangle::new(corners, color.mix(0.5).filled())).map_err(failed)?;
            area.draw(&Rectangle::new(corners, stroke(color, 0.5))).map_err(failed)
        }),
    }
}

fn dot<B: DrawingBackend>(area: &Area<B>, at: (i32, i32), radius: f64, color: RGBColor) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.draw(&Circle::new(at, px(radius), color.filled())).map_err(failed)
}

fn line<B: DrawingBackend>(area: &Area<B>, points: &[(i32, i32)], style: ShapeStyle) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.draw(&PathElement::new(points.to_vec(), style)).map_err(failed)
}

fn dashes<B: DrawingBackend>(area: &Area<B>, points: &[(i32, i32)], style: ShapeStyle) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.draw(&DashedPathElement::new(points.to_vec(), px(5.0), px(3.5), style)).map_err(failed)
}

fn text<B: DrawingBackend>(
    area: &Area<B>,
    text: &str,
    at: (i32, i32),
    size: f64,
    (across, down): (HPos, VPos),
) -> Result<()>
where
    B::ErrorType: 'static,
{
    known_font();
    let style = ("sans-serif", px(size)).into_text_style(area).color(&INK).pos(Pos::new(across, down));
    area.draw(&Text::new(text.to_string(), at, style)).map_err(failed)
}

fn text_width<B: DrawingBackend>(area: &Area<B>, text: &str, size: f64) -> i32
where
    B::ErrorType: 'static,
{
    known_font();
    let style = ("sans-serif", px(size)).into_text_style(area);
    // What cannot be measured gets room by its length.
    area.estimate_text_size(text, &style).map_or(px(size * 0.6) * text.len() as i32, |(width, _)| width as i32)
}

/// Tells plotters our font.
fn known_font() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let registered = register_font("sans-serif", FontStyle::Normal, FONT);
        assert!(registered.is_ok(), "the font is part of the program, and whole");
    });
}
