//! The point-wise kernels against what they are the twins of on the CPU, on the processor.

use candor::ops::dropout::Dropout;
use candor::ops::gate::Activation;
use candor::ops::kernel::Kernel;
use candor::ops::left::parts;
use candor::ops::norm::RmsNorm;
use candor::ops::rope::{Direction, Rotation};

use crate::cuda_on_host::{File, Kernels, TURNS, Turns, alike, blocks, numbers, room, rounded, run, widened, written};

/// Rows and widths that are no multiple of a block, and one that is.
const SHAPES: [(usize, usize); 6] = [(1, 1), (1, 33), (2, 64), (33, 300), (2, 256), (3, 2305)];

/// Runs a check with the threads' turns in both orders, if the kernels can be compiled.
fn check(check: impl Fn(&Kernels, Turns)) {
    if let Some(kernels) = Kernels::of(File::Elementwise) {
        TURNS.into_iter().for_each(|turns| check(kernels, turns));
    }
}

/// So few blocks that each thread has several numbers.
fn spread(turns: Turns) -> crate::cuda_on_host::Launch {
    blocks(2, 256, turns)
}

fn norm(width: usize) -> RmsNorm {
    RmsNorm { gain: numbers(9, width), epsilon: 1e-5 }
}

/// Ties, signs, subnormal numbers, what rounds up to infinity, and what is no number.
#[test]
fn rounding_is_to_the_nearest_even() {
    let mut x = numbers(1, 1000);
    x.extend([0.0, -0.0, 1.003_906_3, 1.011_718_8, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, 1e-40, -1e-45]);
    check(|kernels, turns| {
        let mut out = vec![0u16; x.len()];
        run!(kernels, spread(turns), round_rows(&x[..], &mut out[..], x.len() as i64));
        assert_eq!(out, rounded(&x));
        // Behind an address from which several cannot be read at once.
        run!(kernels, spread(turns), round_rows(&x[1..], &mut out[1..], x.len() as i64 - 1));
        assert_eq!(out, rounded(&x));
        let mut nan = [0u16];
        run!(kernels, spread(turns), round_rows(&[f32::NAN][..], &mut nan[..], 1i64));
        assert!(widened(&nan)[0].is_nan());
    });
}

/// Catches a B that is not turned or scaled, and parts in each other's places.
#[test]
fn an_adapters_parts_are_what_bf16_holds_and_what_it_leaves() {
    let ([rank, narrow, wide], scale) = ([3, 100, 77], 0.7);
    let (a, b) = (numbers(1, rank * narrow), numbers(2, wide * rank));
    let turned = (0..rank).flat_map(|row| b[row..].iter().step_by(rank).map(|b| scale * b)).collect();
    let want = [a.clone(), turned].iter().flat_map(|matrix| parts(matrix, Kernel::Amx)).collect::<Vec<_>>().concat();
    check(|kernels, turns| {
        let (values, mut got) = ([a.clone(), b.clone()].concat(), vec![0; want.len()]);
        let [rank, narrow, wide] = [rank, narrow, wide].map(|size| size as i32);
        run!(kernels, spread(turns), adapter_parts(&values[..], &mut got[..], scale, rank, narrow, wide));
        assert_eq!(got, rounded(&want));
    });
}

#[test]
fn sums_rows_and_embeddings() {
    check(|kernels, turns| {
        for (rows, width) in SHAPES {
            let (x, bias) = (numbers(1, rows * width), numbers(3, width));
            let mut sum = [x.clone(), room(0)].concat();
            run!(kernels, blocks(rows, 256, turns), add_bias(&mut sum[..], &bias[..], rows as i32, width as i32));
            let want: Vec<f32> = x.chunks(width).flat_map(|x| x.iter().zip(&bias).map(|(x, bias)| x + bias)).collect();
            assert_eq!(written(&sum), want);
            let index: Vec<u32> = [rows - 1, 0, rows / 2].map(|row| row as u32).to_vec();
            let picked = |x: &[f32], scale: f32| -> Vec<f32> {
                index
                    .iter()
                    .flat_map(|&row| x[row as usize * width..][..width].iter().map(move |x| scale * x))
                    .collect()
            };
            let mut selected = room(3 * width);
            run!(
                kernels,
                blocks(3, 256, turns),
                select_rows(&x[..], &index[..], &mut selected[..], 3i32, width as i32)
            );
            assert_eq!(written(&selected), picked(&x, 1.0));
            let (table, mut embedded) = (rounded(&x), room(3 * width));
            run!(
                kernels,
                blocks(3, 256, turns),
                embed(&index[..], &table[..], 1.5f32, &mut embedded[..], 3i32, width as i32)
            );
            assert_eq!(written(&embedded), picked(&widened(&table), 1.5));
        }
    });
}

#[test]
fn norms() {
    check(|kernels, turns| {
        for (rows, width) in SHAPES {
            let (x, norm, name) = (numbers(1, rows * width), norm(width), format!("norm {rows} {width}"));
            let mut want = vec![0.0; x.len()];
            norm.forward(&x, &mut want);
            let (mut out, mut bits) = (room(x.len()), vec![0u16; x.len()]);
            let (gain, epsilon) = (&norm.gain[..], norm.epsilon as f32);
            let (rows_i, width_i) = (rows as i32, width as i32);
            let launch = blocks(rows, 256, turns);
            run!(kernels, launch, rms_norm(&x[..], gain, epsilon, &mut out[..], &mut bits[..], rows_i, width_i));
            alike(&name, written(&out), &want, 1e-6);
            assert_eq!(bits, rounded(written(&out)));
            let (null, mut only) = (std::ptr::null_mut::<f32>(), vec![0u16; x.len()]);
            run!(kernels, launch, rms_norm(&x[..], gain, epsilon, null, &mut only[..], rows_i, width_i));
            assert_eq!(only, bits);
            let (grad, before) = (numbers(2, x.len()), numbers(3, x.len()));
            let mut want = before.clone();
            norm.backward(&x, &grad, &mut want);
            let mut dx = [before, room(0)].concat();
            run!(kernels, launch, rms_norm_backward(&x[..], gain, epsilon, &grad[..], &mut dx[..], rows_i, width_i));
            alike(&format!("{name}, backward"), written(&dx), &want, 2e-6);
        }
    });
}

/// The residual sum between two blocks and its norm: what the kernels for each of the steps make together.
#[test]
fn residual_sums_and_norms_together() {
    check(|kernels, turns| {
        for (rows, width) in SHAPES {
            let (x, returned, norm) = (numbers(1, rows * width), numbers(2, rows * width), norm(width));
            let (output, epsilon) = (RmsNorm { gain: numbers(8, width), epsilon: norm.epsilon }, norm.epsilon as f32);
            for normalized in [false, true] {
                let (mut want, mut normed) = (returned.clone(), vec![0.0; x.len()]);
                let gain = if normalized {
                    output.forward(&returned, &mut want);
                    output.gain.as_ptr().cast_mut()
                } else {
                    std::ptr::null_mut()
                };
                want.iter_mut().zip(&x).for_each(|(want, x)| *want += x);
                norm.forward(&want, &mut normed);
                let (mut sum, mut bits) = ([x.clone(), room(0)].concat(), vec![0u16; x.len()]);
                let in_place = sum.as_mut_ptr();
                let (gain2, launch) = (norm.gain.as_ptr().cast_mut(), blocks(rows, 256, turns));
                run!(
                    kernels,
                    launch,
                    residual_norm(
                        in_place,
                        &returned[..],
                        gain,
                        gain2,
                        epsilon,
                        in_place,
                        &mut bits[..],
                        rows as i32,
                        width as i32
                    )
                );
                let name = format!("residual {rows} {width} {normalized}");
                alike(&name, written(&sum), &want, 2e-6);
                alike(&format!("{name}, normed"), &widened(&bits), &normed, 4e-3);
                let (mut only, null, bits) = (room(x.len()), std::ptr::null_mut::<f32>(), std::ptr::null_mut::<u16>());
                run!(
                    kernels,
                    launch,
                    residual_norm(
                        &x[..],
                        &returned[..],
                        gain,
                        null,
                        epsilon,
                        &mut only[..],
                        bits,
                        rows as i32,
                        width as i32
                    )
                );
                assert_eq!(written(&only), written(&sum));
            }
        }
    });
}

/// A prompt's last row predicts for every branch. Catches a row whose gradients overwrite each other.
#[test]
fn the_norm_of_selected_rows_backward() {
    let (width, at) = (70, [3u32, 0, 3, 5, 3, 1, 0]);
    let (x, grad, norm) = (numbers(1, 6 * width), numbers(2, at.len() * width), norm(width));
    let mut want = vec![0.0; x.len()];
    for (row, grad) in at.iter().zip(grad.chunks(width)) {
        let place = *row as usize * width..(*row as usize + 1) * width;
        norm.backward(&x[place.clone()], grad, &mut want[place]);
    }
    let mut order: Vec<u32> = (0..at.len() as u32).collect();
    order.sort_by_key(|&row| at[row as usize]);
    let segment_start = [0u32, 2, 3, 6, 7];
    check(|kernels, turns| {
        let mut dx = [vec![0.0; x.len()], room(0)].concat();
        let (gain, epsilon) = (&norm.gain[..], norm.epsilon as f32);
        run!(
            kernels,
            blocks(4, 256, turns),
            rms_norm_backward_at(
                &x[..],
                gain,
                epsilon,
                &grad[..],
                &mut dx[..],
                &at[..],
                &order[..],
                &segment_start[..],
                4i32,
                width as i32
            )
        );
        alike("selected rows", written(&dx), &want, 2e-6);
    });
}

#[test]
fn rotations() {
    let positions: Vec<usize> = (0..33).map(|row| row * row * 7).collect();
    let positions_u: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
    check(|kernels, turns| {
        for (heads, half) in [(1, 1), (3, 8), (2, 40), (5, 128)] {
            let frequencies: Vec<f64> = (0..half).map(|i| 10_000f64.powf(-(i as f64) / half as f64)).collect();
            let narrow: Vec<f32> = frequencies.iter().map(|&frequency| frequency as f32).collect();
            let (rows, rotation) = (positions.len(), Rotation::new(&positions, &frequencies));
            let (mut cosines, mut sines) = (room(rows * half), room(rows * half));
            run!(
                kernels,
                spread(turns),
                rope_tables(&positions_u[..], &narrow[..], &mut cosines[..], &mut sines[..], rows as i32, half as i32)
            );
            for (direction, sign) in [(Direction::Forward, 1.0f32), (Direction::Backward, -1.0)] {
                let x = numbers(1, rows * heads * 2 * half);
                let (mut want, mut got) = (x.clone(), [x, room(0)].concat());
                rotation.apply(&mut want, 0..rows, direction, 1.0);
                let (cosines, sines) = (written(&cosines), written(&sines));
                let [rows, heads, dim] = [rows, heads, 2 * half].map(|number| number as i32);
                let launch = blocks(rows as usize, 128, turns);
                run!(kernels, launch, rope(&mut got[..], cosines, sines, rows, heads, dim, sign));
                alike(&format!("rope {heads} {half}"), written(&got), &want, 1e-6);
            }
        }
    });
}

#[test]
fn gates() {
    let n = 1111;
    let (gate, up, grad) = (numbers(1, n), numbers(2, n), numbers(3, n));
    // Far out, exponentials overflow; the products must not.
    let gate: Vec<f32> = gate.iter().enumerate().map(|(i, x)| if i % 50 == 0 { 100.0 * x } else { *x }).collect();
    check(|kernels, turns| {
        for (number, activation) in [(0i32, Activation::Silu), (1, Activation::GeluTanh)] {
            let [mut forward, mut backward] = [&vec![0.0; n], &grad].map(|third| [&gate[..], &up, third].concat());
            activation.forward(&mut forward, n);
            activation.backward(&mut backward, n);
            let (want, d_gate, d_up) = (&forward[2 * n..], &backward[..n], &backward[n..2 * n]);
            let mut product = vec![0u16; n];
            run!(kernels, spread(turns), gate(&gate[..], &up[..], &mut product[..], number, n as i64));
            alike(&format!("{activation:?}"), &widened(&product), want, 4e-3);
            let [mut got_gate, mut got_up, mut got_product] = [(); 3].map(|()| room(n));
            let [mut gate_bits, mut up_bits] = [(); 2].map(|()| vec![0u16; n]);
            run!(
                kernels,
                spread(turns),
                gate_backward(
                    &grad[..],
                    &gate[..],
                    &up[..],
                    &mut got_gate[..],
                    &mut got_up[..],
                    &mut gate_bits[..],
                    &mut up_bits[..],
                    &mut got_product[..],
                    number,
                    n as i64
                )
            );
            alike(&format!("{activation:?}, product"), written(&got_product), want, 1e-6);
            alike(&format!("{activation:?}, gate"), written(&got_gate), d_gate, 1e-6);
            alike(&format!("{activation:?}, up"), written(&got_up), d_up, 1e-6);
            assert_eq!((gate_bits, up_bits), (rounded(written(&got_gate)), rounded(written(&got_up))));
            assert_eq!(product, rounded(written(&got_product)));
        }
    });
}

#[test]
fn what_comes_out_of_an_adapters_first_matrix() {
    check(|kernels, turns| {
        for (rows, rank, part_count) in [(1, 1, 1), (3, 16, 2), (2, 200, 2)] {
            let parts = numbers(1, rows * rank * part_count);
            let sum = |row: &[f32], i: usize| row.chunks(rank).map(|part| part[i]).sum::<f32>();
            let want = parts.chunks(rank * part_count).flat_map(|row| (0..rank).map(move |i| 1.25 * sum(row, i)));
            let want: Vec<f32> = want.collect();
            let (mut values, mut left) = (room(rows * rank), vec![0u16; parts.len()]);
            let [rows_i, rank_i, part_count_i] = [rows, rank, part_count].map(|number| number as i32);
            run!(
                kernels,
                blocks(rows, 128, turns),
                adapter_down(&parts[..], rows_i, rank_i, part_count_i, 1.25f32, &mut values[..], &mut left[..])
            );
            assert_eq!(written(&values), want);
            let repeated: Vec<f32> = want.chunks(rank).flat_map(|row| row.repeat(part_count)).collect();
            assert_eq!(left, rounded(&repeated));
        }
    });
}

/// The same in one launch: rows of eight numbers at a time, and of any width. A value that is off by the order of its sum may be
/// rounded to the other side.
#[test]
fn what_comes_out_of_an_adapters_first_matrix_for_few_rows() {
    check(|kernels, turns| {
        for (rows, rank, part_count, width) in [(1, 1, 1, 5), (3, 16, 2, 520), (2, 9, 2, 77)] {
            let (x, matrix) = (rounded(&numbers(1, rows * width)), rounded(&numbers(2, part_count * rank * width)));
            let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
            let (wide_x, wide_matrix) = (widened(&x), widened(&matrix));
            let one = |x: &[f32], i: usize| -> f32 {
                let parts = wide_matrix.chunks(width).skip(i).step_by(rank);
                (1.25 * parts.map(|row| dot(x, row)).sum::<f64>()) as f32
            };
            let want: Vec<f32> =
                wide_x.chunks(width).flat_map(|x| (0..rank).map(move |i| (x, i))).map(|(x, i)| one(x, i)).collect();
            let (mut values, mut left) = (room(rows * rank), vec![0u16; rows * rank * part_count]);
            let [rows_i, rank_i, count, wide] = [rows, rank, part_count, width].map(|number| number as i32);
            run!(
                kernels,
                blocks(rows, 256, turns),
                adapter_down_rows(
                    &x[..],
                    &matrix[..],
                    rows_i,
                    rank_i,
                    count,
                    wide,
                    1.25f32,
                    &mut values[..],
                    &mut left[..]
                )
            );
            alike(&format!("down {rows} {rank} {width}"), written(&values), &want, 2e-6);
            let repeated: Vec<f32> = written(&values).chunks(rank).flat_map(|row| row.repeat(part_count)).collect();
            assert_eq!(left, rounded(&repeated));
        }
    });
}

/// Catches any difference between the device's masks and those of ops/dropout.rs: they must be the same bits.
#[test]
fn dropout_drops_the_same() {
    let (rows, width, layer, projection) = (5, 700, 3, 6);
    let keys: Vec<u64> = (0..rows as u64).map(|row| row.wrapping_mul(0x1234_5678_9abc_def1)).collect();
    for share in [0.0, 0.25, 0.9] {
        let dropout = Dropout { share, rows: keys.clone() };
        let mask = dropout.mask(0..rows, layer, projection);
        let (x, y) = (numbers(1, rows * width), numbers(2, rows * width));
        let want = mask.of(&x, width);
        let bound = (share * 2f64.powi(64)) as u64;
        let [rows_i, width_i, layer, projection] = [rows, width, layer, projection].map(|number| number as i32);
        check(|kernels, turns| {
            let launch = blocks(rows, 256, turns);
            let mut out = room(x.len());
            run!(
                kernels,
                launch,
                mask_floats(&x[..], &mut out[..], &keys[..], bound, layer, projection, rows_i, width_i)
            );
            assert_eq!(written(&out), &want[..]);
            let mut bits = rounded(&x);
            let in_place = bits.as_mut_ptr();
            run!(
                kernels,
                launch,
                mask_rounded(in_place, in_place, &keys[..], bound, layer, projection, rows_i, width_i)
            );
            assert_eq!(bits, rounded(&want));
            let mut sum = [y.clone(), room(0)].concat();
            run!(kernels, launch, mask_add(&x[..], &mut sum[..], &keys[..], bound, layer, projection, rows_i, width_i));
            let want: Vec<f32> = y.iter().zip(&*want).map(|(y, x)| y + x).collect();
            assert_eq!(written(&sum), want);
        });
    }
}

#[test]
fn sums_of_squares() {
    let g = numbers(1, 100_003);
    let want: f64 = g.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
    check(|kernels, turns| {
        let mut parts = vec![f64::NAN; 256];
        run!(kernels, blocks(256, 256, turns), sum_of_squares(&g[..], &mut parts[..], g.len() as i64));
        let sum: f64 = parts.iter().sum();
        assert!((sum - want).abs() < 1e-9 * want, "got {sum}, want {want}");
    });
}
