// Hands a picture of one dot to the composer, pasted or dropped: ([event, target]) => void.
([event, target]) => {
  const dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==";
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(dot), (c) => c.charCodeAt(0))], "dot.png", { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  const made =
    event === "paste"
      ? new ClipboardEvent("paste", { clipboardData: data, ...options })
      : new DragEvent("drop", { dataTransfer: data, ...options });
  document.querySelector(`.composer ${target}`).dispatchEvent(made);
}
