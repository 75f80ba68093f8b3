//! Text of a model's on a terminal: it can neither move the cursor nor hide or reorder what stands around it.

/// The text with everything in a visible form that would act on a terminal: control characters become their pictures (`␛`),
/// those without one, and marks that reorder or hide text, their numbers (`\u{202e}`). Lines stay lines; a tab is four spaces.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for one in text.chars() {
        match one {
            '\n' => shown.push('\n'),
            '\t' => shown.push_str("    "),
            '\0'..='\x1f' => shown.extend(char::from_u32(0x2400 + one as u32)),
            '\x7f' => shown.push('␡'),
            _ if one.is_control() || acts(one) => shown.extend(one.escape_unicode()),
            _ => shown.push(one),
        }
    }
    shown
}

/// Marks of direction, line and paragraph separators, and characters that are not seen.
fn acts(one: char) -> bool {
    matches!(one, '\u{61c}' | '\u{200b}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(one, '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// The same in one line of at most `most` characters, `…` where more follows.
pub fn one_line(text: &str, most: usize) -> String {
    // What is shown comes from no more than so many characters, however long the text is.
    let start: String = text.chars().take(most + 1).map(|one| if one == '\n' { '⏎' } else { one }).collect();
    let shown = printable(&start);
    match shown.chars().count() > most {
        true => shown.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
        false => shown,
    }
}
