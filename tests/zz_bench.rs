#[test]
#[ignore]
fn speed() {
    use candor::ops::matmul::*;
    for (m, k, n) in [(2048usize, 576usize, 1536usize), (2048, 1536, 576), (2048, 576, 576), (64, 576, 1536), (64, 576, 49152), (64, 1536, 576)] {
        let a = vec![0.5f32; m * k];
        let b = vec![0.25f32; n * k];
        let mut c = vec![0f32; m * n];
        for t in [Threads::One, Threads::All] {
            let mut best = f64::MAX;
            for _ in 0..5 {
                let s = std::time::Instant::now();
                matmul(&mut c, n, 0.0, 1.0, Matrix::dense(&a, k), Matrix::dense(&b, k).t(), t);
                best = best.min(s.elapsed().as_secs_f64());
            }
            println!("{m} {k} {n} threads {} : {:.1} GFLOP/s", if t == Threads::One { 1 } else { 2 }, 2.0 * (m * k * n) as f64 / best / 1e9);
        }
    }
    let folder = crate::check::smollm2().unwrap();
    let model = candor::model::Model::open(&folder, &candle_core::Device::Cpu).unwrap();
    use candor::ops::attention::Span;
    let rows = 1800usize;
    let ids: Vec<u32> = (0..rows as u32).map(|i| 1000 + i * 7 % 20000).collect();
    let positions: Vec<usize> = (0..rows).map(|i| i % 300).collect();
    let spans: Vec<Span> = (0..6).map(|s| Span { queries: s * 300..(s + 1) * 300, prefix: 0..0, own: s * 300..(s + 1) * 300 }).collect();
    let adapters = [(0..rows, None)];
    let call = candor::model::Call { ids: &ids, positions: &positions, spans: spans.into(), adapters: &adapters, store: None };
    for _ in 0..2 {
        let s = std::time::Instant::now();
        model.forward(&call).unwrap();
        println!("prefill 1800 rows: {:.2} s", s.elapsed().as_secs_f64());
    }
}
