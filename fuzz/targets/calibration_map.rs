//! A calibration map. What is accepted makes probabilities of probabilities.

#![no_main]

use candor::calibration_map::CalibrationMap;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(map) = CalibrationMap::parse(text) else { return };
    for stated in [0.0, 1e-9, 0.3, 0.5, 0.999, 1.0] {
        let calibrated = map.map.apply(stated);
        assert!((0.0..=1.0).contains(&calibrated), "{stated} becomes {calibrated}: {map:?}");
    }
});
