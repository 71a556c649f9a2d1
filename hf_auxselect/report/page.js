"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  document.documentElement.classList.add("script");

  // Tables as CSV.
  const quote = (text) => `"${text.replace(/\s+/g, " ").trim().replace(/"/g, '""')}"`;
  for (const button of document.querySelectorAll("[data-csv]")) {
    button.addEventListener("click", () => {
      const rows = [...element(button.dataset.csv).rows];
      const text = rows
        .map((row) => [...row.cells].map((cell) => quote(cell.textContent)).join(","))
        .join("\r\n");
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = `${button.dataset.csv}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }

  // Tasks that the table leaves out.
  const cell = (row, tag, text, name = "") => {
    const result = row.appendChild(document.createElement(tag));
    result.textContent = text;
    result.className = name;
    return result;
  };
  const find = element("find");
  if (find) {
    find.addEventListener("input", () => {
      const body = element("found").tBodies[0];
      body.replaceChildren();
      const wanted = find.value.trim().toLowerCase();
      if (!wanted) return;
      const found = data.search.filter(([name]) => name.toLowerCase().includes(wanted));
      for (const [name, weight, loss, low, high] of found.slice(0, 20)) {
        const row = body.insertRow();
        cell(row, "th", name).scope = "row";
        cell(row, "td", `${(100 * weight).toFixed(1)}%`, "number");
        cell(row, "td", loss === undefined ? "" : loss.toFixed(4), "number");
        cell(row, "td", loss === undefined ? "" : `${low.toFixed(4)} to ${high.toFixed(4)}`, "number wide");
      }
    });
  }

  if (!data.whatIf) return;

  // The approximation: see hf_auxselect/report/what_if.py.
  const { tasks, scale, means, all_tasks: allTasks, error } = data.whatIf;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const roots = Float64Array.from(bytes(data.whatIf.anchors), (unit) => Math.sqrt(unit / 255));
  const count = roots.length / tasks.length;
  const view = new DataView(bytes(data.whatIf.coefficients).buffer);
  const coefficients = means.map((_, o) =>
    Float64Array.from({ length: count }, (_, a) => view.getFloat64(8 * (o * count + a), true)),
  );

  /** The outputs for shares that sum to 1: loss, half-widths of its interval, of the difference. */
  function outputs(shares) {
    const own = shares.map(Math.sqrt);
    const kernel = new Float64Array(count);
    for (let a = 0; a < count; a++) {
      let square = 0;
      for (let k = 0; k < own.length; k++) square += (own[k] - roots[a * own.length + k]) ** 2;
      const u = Math.sqrt(scale * square);
      kernel[a] = (1 + u) * Math.exp(-u);
    }
    return coefficients.map((row, o) => {
      let sum = means[o];
      for (let a = 0; a < count; a++) sum += row[a] * kernel[a];
      return o === 0 ? sum : Math.max(sum, 0);
    });
  }

  const size = (k) => data.sizes[tasks[k]] || 1;
  const normalized = (shares) => {
    const sum = shares.reduce((a, b) => a + b, 0);
    return sum > 0 ? shares.map((share) => share / sum) : null;
  };
  const subset = (chosen) => normalized(tasks.map((_, k) => (chosen(k) ? size(k) : 0)));
  const chosen = normalized(tasks.map((name) => data.weights[name] || 0)) || subset(() => true);
  const everything = subset(() => true);
  let shares = chosen;

  // The mixture in the address: name=weight, as --tasks of the command line takes it.
  const fromAddress = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    const values = tasks.map((name) => Math.max(0, Number(given.get(name)) || 0));
    return normalized(values.map((value) => (Number.isFinite(value) ? value : 0)));
  };
  const toAddress = () => {
    const parts = new URLSearchParams();
    tasks.forEach((name, k) => {
      if (shares[k] > 0) parts.append(name, String(Number(shares[k].toFixed(6))));
    });
    history.replaceState(null, "", `#${parts}`);
  };

  /** A row of the report that this mixture is, whose estimate is exact. */
  const known = (mixture) => {
    const same = (other) => mixture.every((share, k) => Math.abs(share - other[k]) < 1e-6);
    const isWhole = tasks.length === Object.keys(data.weights).length;
    if (isWhole && same(everything)) return data.rows.find((row) => row.name === "all tasks");
    return same(chosen) ? data.rows.find((row) => row.name === "chosen") : undefined;
  };

  const place = (loss) => {
    const ends = data.rows.filter((row) => row.name !== "no further training");
    const low = Math.min(...ends.map((row) => row.low));
    const high = Math.max(...ends.map((row) => row.high));
    return (100 * Math.min(Math.max((loss - low) / (high - low || 1), 0), 1)).toFixed(2);
  };

  const body = element("mixture").tBodies[0];
  const inputs = tasks.map((name, k) => {
    const row = body.insertRow();
    const label = cell(row, "th", "").appendChild(document.createElement("label"));
    label.parentElement.scope = "row";
    const tick = label.appendChild(document.createElement("input"));
    tick.type = "checkbox";
    const shown = label.appendChild(document.createElement("bdi"));
    shown.textContent = name.replace(/[\p{Cc}\p{Cf}]/gu, "�");
    const slider = cell(row, "td", "", "slider").appendChild(document.createElement("input"));
    Object.assign(slider, { type: "range", min: "0", max: "100", step: "0.1" });
    slider.setAttribute("aria-label", `Share of ${name}`);
    const percent = cell(row, "td", "", "number");
    tick.addEventListener("change", () => {
      const others = shares.map((share, j) => (j === k ? 0 : share));
      const total = others.reduce((sum, share, j) => sum + (share > 0 ? size(j) : 0), 0);
      if (!tick.checked && total === 0) tick.checked = true; // the last task stays
      const part = tick.checked ? size(k) / (size(k) + total) : 0;
      change(normalized(others)?.map((share, j) => (j === k ? part : share * (1 - part))) ?? shares);
    });
    slider.addEventListener("input", () => {
      const part = Math.min(Math.max(Number(slider.value) / 100, 0), 1);
      const others = normalized(shares.map((share, j) => (j === k ? 0 : share)));
      if (others) change(others.map((share, j) => (j === k ? part : share * (1 - part))));
      else change(shares);
    });
    return { tick, slider, percent };
  });

  function show() {
    const [loss, below, above, lessBelow, lessAbove] = outputs(shares);
    const row = known(shares);
    const answer = row ?? { loss, low: Math.max(loss - below, 0), high: loss + above };
    element("loss").textContent = `${answer.loss.toFixed(4)} nats per label token`;
    element("loss").dataset.value = String(answer.loss);
    element("loss").dataset.approximation = String(loss);
    element("interval").textContent = `90% interval ${answer.low.toFixed(4)} to ${answer.high.toFixed(4)}`;
    const less = answer.loss - allTasks;
    const isAll = row?.name === "all tasks";
    const verdict =
      less - lessBelow > 0 || less + lessAbove < 0
        ? "significantly different from all tasks"
        : "not significantly different from all tasks";
    element("difference").textContent = isAll
      ? "This is the mixture of all tasks."
      : `${Math.abs(less).toFixed(4)} ${less < 0 ? "below" : "above"} all tasks ` +
        `(${(less - lessBelow).toFixed(4)} to ${(less + lessAbove).toFixed(4)}): ${verdict}.`;
    element("source").textContent = row
      ? "The estimator's own answer."
      : `Approximation of the estimator, within ${error.toFixed(4)} nats in 90% of mixtures.`;
    element("answer-range").setAttribute("d", `M${place(answer.low)} 10H${place(answer.high)}`);
    element("answer-dot").setAttribute("d", `M${place(answer.loss)} 10h0`);
    element("answer-line").setAttribute("d", `M${place(allTasks)} 0V20`);
    inputs.forEach(({ tick, slider, percent }, k) => {
      tick.checked = shares[k] > 0;
      slider.value = String(100 * shares[k]);
      percent.textContent = (100 * shares[k]).toFixed(1);
    });
  }

  function change(next) {
    shares = next;
    show();
    toAddress();
  }

  /** The smallest change found that reaches a loss: share moves from one task to another. */
  function reach(goal) {
    const lossOf = (mixture) => outputs(mixture)[0];
    const moved = (from, to, part, mixture) =>
      mixture.map((share, k) => share - (k === from ? part : 0) + (k === to ? part : 0));
    let mixture = shares;
    let loss = lossOf(mixture);
    for (let step = 0.05; step > 0.004; ) {
      if (loss <= goal) return { mixture, loss };
      // Ends of a move, by the slope of the loss along each task.
      const slopes = tasks.map((_, k) => lossOf(mixture.map((s, j) => s * 0.99 + (j === k ? 0.01 : 0))));
      const order = tasks.map((_, k) => k).sort((a, b) => slopes[a] - slopes[b]);
      let best = null;
      for (const to of order.slice(0, 4))
        for (const from of order.filter((k) => mixture[k] > 1e-9 && k !== to).slice(-4)) {
          const next = moved(from, to, Math.min(step, mixture[from]), mixture);
          const nextLoss = lossOf(next);
          if (nextLoss < (best?.loss ?? loss) - 1e-9) best = { mixture: next, loss: nextLoss };
        }
      if (!best) step /= 2;
      else if (best.loss <= goal) {
        // No further than needed along the last move.
        let [near, far] = [0, 1];
        const between = (t) => mixture.map((share, k) => share + t * (best.mixture[k] - share));
        for (let i = 0; i < 20; i++) {
          const middle = (near + far) / 2;
          if (lossOf(between(middle)) <= goal) far = middle;
          else near = middle;
        }
        return { mixture: between(far), loss: lossOf(between(far)) };
      } else ({ mixture, loss } = best);
    }
    return { mixture, loss, failed: loss > goal };
  }

  element("reach").addEventListener("click", () => {
    const goal = element("goal").valueAsNumber;
    const reached = element("reached");
    if (!Number.isFinite(goal)) {
      reached.textContent = "Give a loss in nats per label token, such as 1.05.";
      return;
    }
    const before = shares;
    const { mixture, loss, failed } = reach(goal);
    if (failed) {
      reached.textContent = `No mixture found reaches ${goal}; the lowest estimate found from here is ${loss.toFixed(4)}.`;
      return;
    }
    const change_ = mixture.reduce((sum, share, k) => sum + Math.abs(share - before[k]), 0) / 2;
    reached.textContent =
      change_ < 1e-9
        ? "The present mixture reaches it."
        : `${(100 * change_).toFixed(1)}% of the examples change their task; the mixture above is now this one.`;
    change(mixture);
  });
  element("set-chosen").addEventListener("click", () => change(chosen));
  element("set-all").addEventListener("click", () => change(everything));
  element("copy").addEventListener("click", async () => {
    toAddress();
    const button = element("copy");
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Link copied";
    } catch {
      button.textContent = "Copy the address of this page";
    }
  });
  addEventListener("hashchange", () => {
    shares = fromAddress() ?? chosen;
    show();
  });
  shares = fromAddress() ?? chosen;
  show();
})();
