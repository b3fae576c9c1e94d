//! Runs seeds and prints their reports.
fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (from, to): (u64, u64) = (args[0].parse().unwrap(), args[1].parse().unwrap());
    let profile = baton_sim::Profile::named(&args[2]).unwrap();
    let verbose = args.len() > 3;
    for seed in from..to {
        let report = baton_sim::run_with(&baton_sim::Plan::draw(seed, &profile), args.len() > 4);
        if verbose {
            for line in &report.lines {
                println!("{:>10.3} {:<14} {}", line.at_us as f64 / 1e3, line.host, line.text);
            }
        }
        println!("{}", serde_json::to_string(&report).unwrap());
    }
}
