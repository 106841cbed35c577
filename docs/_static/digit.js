"use strict";
// A network that classifies a drawing, with the backward rules of fcfunc.ops.

const digit = (() => {
  const SIDE = 32; // pixels of the bitmap
  const BLOCK = 4; // pixels of a side of an input
  const CELLS = SIDE / BLOCK;
  const PEN = 5; // width of a stroke in the bitmap, about that of the training digits

  // Rules: forward returns [out, residuals], backward returns cotangents.

  function affineFwd(x, w, b) {
    // y = x W + b
    const out = b.map((bias, j) => x.reduce((sum, xi, i) => sum + xi * w[i][j], bias));
    return [out, { x, w }];
  }

  function affineBwd({ w }, g) {
    // dx = g Wᵀ
    return w.map((row) => row.reduce((sum, wij, j) => sum + g[j] * wij, 0));
  }

  function reluFwd(x) {
    return [x.map((xi) => Math.max(xi, 0)), { x }];
  }

  function reluBwd({ x }, g) {
    // dx = g where x > 0, otherwise 0
    return g.map((gi, i) => (x[i] > 0 ? gi : 0));
  }

  function softmax(z) {
    const top = Math.max(...z);
    const e = z.map((zi) => Math.exp(zi - top));
    const sum = e.reduce((a, b) => a + b);
    return e.map((ei) => ei / sum);
  }

  function classify(params, x) {
    const [a, saved0] = affineFwd(x, params[0].w, params[0].b);
    const [hidden, saved1] = reluFwd(a);
    const [logits, saved2] = affineFwd(hidden, params[1].w, params[1].b);
    const probabilities = softmax(logits);
    const best = logits.indexOf(Math.max(...logits));
    const cotangent = logits.map((_, k) => (k === best ? 1 : 0));
    const gradient = affineBwd(saved0, reluBwd(saved1, affineBwd(saved2, cotangent)));
    return { hidden, logits, probabilities, best, gradient };
  }

  // From strokes, in units of the drawing area, to 64 numbers.

  function toInputs(strokes) {
    const points = strokes.flat();
    const xs = points.map((p) => p[0]);
    const ys = points.map((p) => p[1]);
    const [left, right] = [Math.min(...xs), Math.max(...xs)];
    const [top, bottom] = [Math.min(...ys), Math.max(...ys)];
    const room = SIDE - PEN;
    const scale = room / Math.max(right - left, bottom - top, 0.05);
    const place = ([x, y]) => [
      SIDE / 2 + (x - (left + right) / 2) * scale,
      SIDE / 2 + (y - (top + bottom) / 2) * scale,
    ];
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIDE;
    const context = canvas.getContext("2d");
    drawStrokes(context, strokes.map((stroke) => stroke.map(place)), PEN, "black");
    const alpha = context.getImageData(0, 0, SIDE, SIDE).data.filter((_, i) => i % 4 === 3);
    const inputs = new Array(CELLS * CELLS).fill(0);
    alpha.forEach((value, i) => {
      const cell = Math.floor(i / SIDE / BLOCK) * CELLS + Math.floor((i % SIDE) / BLOCK);
      inputs[cell] += value / 255 / BLOCK ** 2;
    });
    return inputs.map((value) => Math.round(16 * value) / 16); // whole pixels of 16, as in the data
  }

  function drawStrokes(context, strokes, width, color) {
    Object.assign(context, { lineWidth: width, lineCap: "round", lineJoin: "round", strokeStyle: color });
    for (const stroke of strokes) {
      context.beginPath();
      context.moveTo(...stroke[0]);
      for (const point of stroke) context.lineTo(...point);
      if (stroke.length === 1) context.lineTo(stroke[0][0] + 0.01, stroke[0][1]);
      context.stroke();
    }
  }

  return { classify, toInputs, drawStrokes };
})();

(() => {
  const get = (name) => document.getElementById(`digit-${name}`);
  const canvas = get("canvas");
  const examples = [
    [[[.5, .1], [.3, .3], [.28, .6], [.42, .88], [.62, .85], [.72, .6], [.7, .3], [.5, .1]]],
    [[[.38, .28], [.54, .1], [.54, .9]]],
    [[[.3, .3], [.4, .13], [.6, .12], [.68, .3], [.55, .55], [.3, .88], [.72, .86]]],
    [[[.3, .15], [.6, .12], [.68, .28], [.6, .43], [.44, .48], [.62, .52], [.7, .7], [.58, .87], [.3, .87]]],
    [[[.5, .1], [.28, .58], [.74, .56]], [[.62, .36], [.58, .92]]],
    [[[.68, .12], [.38, .12], [.34, .45], [.55, .42], [.7, .58], [.66, .8], [.5, .9], [.3, .84]]],
    [[[.6, .1], [.4, .3], [.3, .6], [.36, .84], [.54, .9], [.68, .76], [.62, .58], [.46, .56], [.33, .7]]],
    [[[.28, .14], [.72, .12], [.56, .5], [.46, .9]], [[.36, .5], [.7, .48]]],
    [[[.52, .48], [.34, .32], [.4, .14], [.6, .12], [.68, .28], [.52, .48], [.34, .68], [.38, .86], [.58, .9],
      [.7, .72], [.52, .48]]],
    [[[.66, .3], [.54, .12], [.36, .2], [.34, .4], [.5, .48], [.66, .36], [.66, .3], [.64, .6], [.52, .9]]],
  ];
  let strokes = [];
  let pen = null; // the stroke that is being drawn
  let cursor = null; // the pen of the keyboard
  let next = 3; // the next example

  const color = (name) => getComputedStyle(get("answer")).getPropertyValue(name).trim();

  function show() {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const inPixels = strokes.map((stroke) => stroke.map(([x, y]) => [x * canvas.width, y * canvas.height]));
    digit.drawStrokes(context, inPixels, 22, color("--color-foreground-primary"));
    if (cursor) {
      Object.assign(context, { lineWidth: 2, strokeStyle: color("--color-brand-primary") });
      context.beginPath();
      context.arc(cursor[0] * canvas.width, cursor[1] * canvas.height, pen ? 6 : 12, 0, 7);
      context.stroke();
    }
    const bars = get("bars").children;
    if (!strokes.length) {
      get("answer").textContent = "Draw a digit.";
      for (const bar of bars) bar.style.setProperty("--share", 0);
      for (const name of ["input", "hidden", "gradient"]) grid(get(name), [], 8);
      return;
    }
    const inputs = digit.toInputs(strokes);
    const { hidden, probabilities, best, gradient } = digit.classify(DIGIT_PARAMS, inputs);
    get("answer").textContent = `${best}, with probability ${probabilities[best].toFixed(2)}`;
    probabilities.forEach((p, k) => {
      bars[k].style.setProperty("--share", p);
      bars[k].title = `${k}: ${p.toFixed(3)}`;
    });
    grid(get("input"), inputs, 8);
    grid(get("hidden"), hidden, 16);
    grid(get("gradient"), gradient, 8);
  }

  /** A square of values: blue above 0, orange below, from transparent to full at the largest. */
  function grid(target, values, side) {
    const context = target.getContext("2d");
    const cell = target.width / side;
    const largest = Math.max(...values.map(Math.abs), 1e-9);
    context.clearRect(0, 0, target.width, target.height);
    values.forEach((value, i) => {
      context.globalAlpha = Math.abs(value) / largest;
      context.fillStyle = value > 0 ? "#2f7fd1" : "#e07b00";
      context.fillRect((i % side) * cell, Math.floor(i / side) * cell, cell, cell);
    });
    context.globalAlpha = 1;
  }

  function clear() {
    [strokes, pen, cursor] = [[], null, null];
    show();
  }

  function position(event) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  function moveCursor(dx, dy) {
    const inside = (value) => Math.min(Math.max(value, 0.05), 0.95);
    cursor = cursor ? [inside(cursor[0] + dx), inside(cursor[1] + dy)] : [0.5, 0.5];
    if (pen) pen.push(cursor);
  }

  canvas.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    cursor = null;
    strokes.push((pen = [position(event)]));
    show();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!pen || cursor) return;
    pen.push(position(event));
    show();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (pen = cursor ? pen : null));

  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.key in moves) moveCursor(...moves[event.key].map((step) => step / 20));
    else if (event.key === " ") {
      if (!cursor) moveCursor(0, 0);
      if (pen) pen = null;
      else strokes.push((pen = [cursor]));
    } else if (event.key === "Escape") clear();
    else return;
    event.preventDefault();
    show();
  });

  get("clear").addEventListener("click", clear);
  get("example").addEventListener("click", () => {
    clear();
    strokes = examples[next];
    next = (next + 1) % examples.length;
    show();
  });
  new MutationObserver(show).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);

  for (let k = 0; k < 10; k++) {
    const bar = get("bars").appendChild(document.createElement("div"));
    bar.textContent = k;
  }
  show();
})();
